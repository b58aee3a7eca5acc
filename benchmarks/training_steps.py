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
        "pairs_at_once": arguments.micro_batch
        * (pairs_of_prompt(arguments) if arguments.run in ("this", "regularized") else 1),
        "comparisons": len(timed) * pairs_of_prompt(arguments),
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
    """Tokens of the prompt and of the responses that are chosen over others, but for the first: nothing predicts it."""
    return len(row["prompt_ids"]) + sum(len(row["response_ids"][index]) for index in set(row["first"])) - 1


def pairs_of_prompt(arguments: argparse.Namespace) -> int:
    """Comparisons that a prompt has."""
    return 1 if arguments.responses is None else arguments.responses * (arguments.responses - 1) // 2


def pairs_of(row: dict) -> list[tuple[int, int]]:
    """(preferred, other) of each comparison of a row."""
    return list(zip(row["first"], row["second"], strict=True))


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
        what = "pairs" if arguments.responses is None else "prompts"
        raise InputError(f"--dataset has {len(order)} {what}, {steps} steps need more: lower --steps or --global_batch")
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
    pairs_in_step = arguments.global_batch * pairs_of_prompt(arguments)
    losses, began = [], 0.0
    for step in range(WARM_UP + arguments.steps):
        if step == WARM_UP:
            began = time.perf_counter()
        total = 0.0
        batch = order[step * arguments.global_batch : (step + 1) * arguments.global_batch]
        pairs = [(row, pair) for row in map(table.__getitem__, batch) for pair in pairs_of(row)]
        for start in range(0, pairs_in_step, size):
            part = pairs[start : start + size]
            ids = [row["prompt_ids"] + row["response_ids"][pair[side]] for side in (0, 1) for row, pair in part]
            input_ids, mask = left_padded(ids, device)
            hidden = backbone(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
            embeddings = model.value_head(hidden[:, -1])
            if preference.normalize:
                embeddings = normalize_embedding(embeddings)
            score = preference_score(embeddings[:size], embeddings[size:])
            loss = preference_loss(score, temperature=preference.temperature).mean() * size / pairs_in_step
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
        {
            side: record["prompt"] + record["responses"][one]
            for side, one in zip(("chosen", "rejected"), pair, strict=True)
        }
        for record in records
        for pair in pairs_of(record)
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
            gradient_accumulation_steps=arguments.global_batch * pairs_of_prompt(arguments) // arguments.micro_batch,
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
