"""Optimizer steps of a training run, done in three ways and timed: what train_throughput.py starts as processes."""

import argparse
import json
import tempfile
import time

import torch

from benchmarks.machine import matmul_rate, peak_memory
from general_preference.datasets.tokenization import ComparisonTokenizer, load_tokenizer
from general_preference.errors import InputError

SWITCHES = ("bf16", "gradient_checkpointing", "selective_checkpointing", "torch_compile", "use_liger_kernel")
WARM_UP = 1  # steps that are not timed: the first allocates


def run_one(arguments: argparse.Namespace) -> None:
    """Train a few steps one way; the last line of the output is the result as JSON."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    before = matmul_rate(dtype)
    found = {"this": run_this, "regularized": run_this, "padded": run_padded, "trl": run_trl}[arguments.run](arguments)
    model, table, order = found.pop("model"), found.pop("table"), found.pop("order")
    timed = order[WARM_UP * arguments.global_batch :]
    lengths = table["length"][:]
    found |= {
        "name": arguments.run,
        "micro_batch": arguments.micro_batch,
        "comparisons": len(timed),
        "unique_tokens": sum(lengths[index] for index in timed),
        "chosen_tokens": sum(predicted_tokens(table[index]) for index in timed),
        "parameters": non_embedding_parameters(model),
        "peak_bytes": peak_memory(),
        "matmul_flops": (before + matmul_rate(dtype)) / 2,
    }
    print("\n" + json.dumps(found))


def non_embedding_parameters(model) -> int:
    """Weights that multiply every token: those of the layers."""
    return sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in model.named_parameters()
        if ".layers." in name
    )


def predicted_tokens(row: dict) -> int:
    """Tokens of the prompt and the chosen response of a pair, but for the first, which nothing predicts."""
    return len(row["prompt_ids"]) + len(row["response_ids"][row["first"][0]]) - 1


def trainer_arguments(arguments: argparse.Namespace):
    """The flags of the training script that describe this benchmark."""
    from general_preference.trainer.arguments import parse_arguments

    flags = {
        "pretrain": arguments.backbone,
        "dataset": arguments.dataset,
        "preference_head": arguments.head,
        "max_len": arguments.max_len,
        "micro_train_batch_size": arguments.micro_batch,
        "accumulated_gradient": arguments.global_batch // arguments.micro_batch,
        "learning_rate": 1e-4,
        "warmup_ratio": 0,
        "zero_stage": arguments.zero_stage,
        "add_pretrain_loss": arguments.run == "regularized",
        "attn_implementation": arguments.attn_implementation,
        **{name: getattr(arguments, name) for name in SWITCHES},
        "logging_steps": 10**6,
    }
    return parse_arguments([f"--{name}={value}" for name, value in flags.items()])


def load_table(arguments: argparse.Namespace):
    """(tokenized comparisons, the order in which a run of the trainer sees them, for as many steps as are run)."""
    from general_preference.datasets.sampler import StepSampler
    from scripts.train_rm_general_preference import prepare_data

    encoder = ComparisonTokenizer(load_tokenizer(str(arguments.backbone)), arguments.max_len)
    flags = trainer_arguments(arguments)
    table, *_ = prepare_data(flags, encoder)
    steps = WARM_UP + arguments.steps
    order = StepSampler(table["length"][:], micro_batch_size=arguments.global_batch, seed=flags.optimizer.seed).order(0)
    if len(order) < steps * arguments.global_batch:
        raise InputError(f"--dataset has {len(order)} pairs, {steps} steps need more: lower --steps or --global_batch")
    return table, order[: steps * arguments.global_batch]


def run_this(arguments: argparse.Namespace) -> dict:
    """The trainer's own steps: data pipeline, engine, optimizer, metrics."""
    from general_preference.trainer.deepspeed_engine import DeepSpeedEngine
    from general_preference.trainer.objectives import PreferenceObjective
    from general_preference.trainer.trainer import Trainer
    from scripts.train_rm_general_preference import make_model, resolve_preference

    table, order = load_table(arguments)
    flags = trainer_arguments(arguments)
    with tempfile.TemporaryDirectory() as folder:
        flags.output.save_path = folder
        engine, tokenizer = DeepSpeedEngine(flags.engine, flags.optimizer), load_tokenizer(str(arguments.backbone))
        model = make_model(flags, resolve_preference(flags), engine.config())
        objective = PreferenceObjective(flags.loss, model, tokenizer, engine.device)
        trainer = Trainer(flags, engine, model, tokenizer, objective, table, {})
        batches, losses, began = trainer.batches(), [], 0.0
        for step in range(1, WARM_UP + arguments.steps + 1):
            trainer.train_step(batches)
            losses.append(trainer.window.reduce()["train/loss"])
            if step == WARM_UP:
                began = time.perf_counter()
        seconds = time.perf_counter() - began
        engine.context.close()
    return {"seconds": seconds, "losses": losses, "model": model, "table": table, "order": order}


def run_padded(arguments: argparse.Namespace) -> dict:
    """Chosen and rejected as two left-padded sequences of one batch, eager attention, torch's AdamW."""
    from general_preference.models.device import choose_device
    from general_preference.models.losses import preference_loss
    from general_preference.models.reward_model import get_reward_model
    from general_preference.models.score import normalize_embedding, preference_score

    table, order = load_table(arguments)
    flags = trainer_arguments(arguments)
    preference = flags.model.preference(arguments.max_len)
    device = choose_device()
    model = get_reward_model(
        str(arguments.backbone), bf16=arguments.bf16, preference=preference, attn_implementation="eager"
    ).to(device)
    model.freeze_unused(language_model_head=False)
    model.train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    backbone, size = model.language_model.base_model, arguments.micro_batch
    accumulation = arguments.global_batch // size
    losses, began = [], 0.0
    for step in range(WARM_UP + arguments.steps):
        if step == WARM_UP:
            began = time.perf_counter()
        total = 0.0
        batch = order[step * arguments.global_batch : (step + 1) * arguments.global_batch]
        for start in range(0, arguments.global_batch, size):
            rows = [table[index] for index in batch[start : start + size]]
            ids = [row["prompt_ids"] + row["response_ids"][side] for side in (0, 1) for row in rows]
            input_ids, mask = left_padded(ids, device)
            hidden = backbone(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
            embeddings = model.value_head(hidden[:, -1])
            if preference.normalize:
                embeddings = normalize_embedding(embeddings)
            score = preference_score(embeddings[:size], embeddings[size:])
            loss = preference_loss(score, temperature=preference.temperature).mean() / accumulation
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "losses": losses, "model": model, "table": table, "order": order}


def left_padded(ids: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), each (N, longest): sequences that end together, as padded trainers lay them out."""
    longest = max(map(len, ids))
    padded = [[0] * (longest - len(one)) + one for one in ids]
    mask = [[0] * (longest - len(one)) + [1] * len(one) for one in ids]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def run_trl(arguments: argparse.Namespace) -> dict:
    """TRL's RewardTrainer with its defaults, on the same conversations in the same steps."""
    import datasets
    from transformers import AutoModelForSequenceClassification, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    from general_preference.datasets.sources import load_source, parse_sources

    table, order = load_table(arguments)
    source, _ = load_source(parse_sources(arguments.dataset)[0])
    records = [source[index] for index in order]
    rows = [
        {"chosen": record["prompt"] + record["responses"][0], "rejected": record["prompt"] + record["responses"][1]}
        for record in records
    ]
    clock: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, _arguments, state, _control, **_):
            clock[state.global_step] = time.perf_counter()

    class InOrder(RewardTrainer):
        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=arguments.micro_batch,
            gradient_accumulation_steps=arguments.global_batch // arguments.micro_batch,
            max_length=arguments.max_len,
            learning_rate=1e-4,
            num_train_epochs=1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=arguments.bf16,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=arguments.gradient_checkpointing,
            use_liger_kernel=arguments.use_liger_kernel,
            disable_tqdm=True,
        )
        model = AutoModelForSequenceClassification.from_pretrained(
            arguments.backbone, num_labels=1, dtype=torch.bfloat16 if arguments.bf16 else torch.float32
        )
        trainer = InOrder(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=load_tokenizer(str(arguments.backbone)),
            callbacks=[Clock()],
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = clock[WARM_UP + arguments.steps] - clock[WARM_UP]
    return {"seconds": seconds, "losses": losses, "model": model, "table": table, "order": order}
