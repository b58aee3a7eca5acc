"""Reward models of other tools: they get the rewards that the tool itself gives, or are refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from eval.batch_inference_rm_general_preference import main as batch_inference
from general_preference import GPMPipeline, get_reward_model
from general_preference.datasets.tokenization import ComparisonTokenizer
from general_preference.errors import InputError
from general_preference.models.heads import read_heads, saved_preference
from general_preference.models.merging import merge_into_folder
from rewardbench_eval.run_rm_rewardbench import main as rewardbench
from scripts.make_tiny_model import CHAT_TEMPLATE, END, PAD, train_tokenizer
from tests.conftest import HIDDEN
from tests.test_rewardbench import pairs

peft = pytest.importorskip("peft")

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PROMPTS = [
    "Which throw wins?",
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name one."},
        {"role": "assistant", "content": "The rock."},
        {"role": "user", "content": "And another one, the longest?"},
    ],
]
RESPONSES = [["The rock.", "The paper, the scissors; the rock äöü 你好.", ""], [" scissors", "a system prompt\n\n"]]
INDEX = "model.safetensors.index.json"
SIX = ("llama", "qwen2", "qwen3", "gemma2", "mistral_window", "gpt2")


def classifier(folder: str, target: Path, pad: str | None = None, labels: int = 1, template: str = TEMPLATE) -> str:
    """A sequence classifier with the backbone in `folder`, as transformers saves it; `pad` is its padding token."""
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.pad_token = pad
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def messages(prompt, response: str) -> list[dict]:
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*prompt, {"role": "assistant", "content": response}]


@torch.no_grad()
def own_rewards(folder: str, batched: bool) -> list[torch.Tensor]:
    """What transformers itself says of `RESPONSES`."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    talks = [messages(p, r) for p, responses in zip(PROMPTS, RESPONSES, strict=True) for r in responses]
    encoded = [tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"] for talk in talks]
    if batched:
        logits = model(**tokenizer.pad({"input_ids": encoded}, return_tensors="pt")).logits[:, 0]
    else:
        logits = torch.cat([model(torch.tensor([ids])).logits[:, 0] for ids in encoded])
    return list(logits.split(list(map(len, RESPONSES))))


def largest_difference(folder: str, batched: bool = True) -> float:
    rm = GPMPipeline(folder)
    assert rm.preference.head == "bt" and rm.preference.input_format == "sequence_classification"
    expected, found = own_rewards(folder, batched), rm.embed(PROMPTS, RESPONSES)
    assert all(rewards.std() > 1e-3 for rewards in expected), "rewards that differ"
    matrix, rewards = rm.score_matrix(PROMPTS[0], RESPONSES[0]), expected[0]
    torch.testing.assert_close(matrix, rewards[:, None] - rewards[None], rtol=0, atol=2e-5)
    return max((one.embeddings[:, 0] - two).abs().max().item() for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", SIX)
def test_rewards_are_those_of_transformers(model_folder, tmp_path, family, capsys):
    difference = largest_difference(classifier(model_folder(family), tmp_path / "rm", PAD))
    with capsys.disabled():
        print(f"\n{family}: rewards differ from transformers' by at most {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.parametrize("batched", [True, False])
def test_padding_is_passed_over_as_transformers_does(model_folder, tmp_path, batched):
    """Where padding is also the end of a turn, the reward stands one token earlier; without padding, last."""
    folder = classifier(model_folder("llama"), tmp_path / "rm", END if batched else None, template=CHAT_TEMPLATE)
    assert (saved_preference(folder).pad_token_id is not None) == batched
    assert largest_difference(folder, batched) < 1e-5


def test_long_conversations_keep_their_last_tokens(model_folder, tmp_path):
    rm = GPMPipeline(classifier(model_folder("llama"), tmp_path / "rm", PAD), max_length=64)
    row = rm.encoder.encode([PROMPTS[1]], [[[{"role": "assistant", "content": "scissors " * 80}]]])[0]
    whole = row["prompt_ids"] + row["response_ids"][0]
    assert len(whole) == 64 and row["response_cut"]
    assert rm.tokenizer.decode(whole).endswith("<|end|>\n"), "what the reward is read behind"


def comparisons() -> list[dict]:
    rows = zip(PROMPTS * 4, RESPONSES * 4, "abcdefgh", strict=True)
    return [{"prompt": messages(p, "")[:-1], "chosen": messages("", letter + r[0])[1:],
             "rejected": messages("", r[1])[1:]} for p, r, letter in rows]  # fmt: skip


def train_with_trl(folder: str, output: Path, lora: bool) -> float:
    """A few steps of TRL's reward trainer; the mean margin of its own evaluation."""
    from trl import RewardConfig, RewardTrainer

    options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 3, "learning_rate": 1e-3}
    config = RewardConfig(str(output), report_to=[], save_strategy="no", use_cpu=True, bf16=False, **options)
    adapters = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", modules_to_save=["score"])
    data = Dataset.from_list(comparisons())
    trainer = RewardTrainer(
        folder, args=config, train_dataset=data, eval_dataset=data, peft_config=adapters if lora else None
    )
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()["eval_margin"]


@pytest.fixture(scope="module")
def trained_by_trl(model_folder, tmp_path_factory):
    """Folders that TRL trained in full and by LoRA, with the mean margin that it found."""
    folder = tmp_path_factory.mktemp("trl")
    shutil.copytree(model_folder("qwen2"), folder / "base")
    return {lora: (str(folder / f"rm{lora}"), train_with_trl(str(folder / "base"), folder / f"rm{lora}", lora))
            for lora in (False, True)}  # fmt: skip


def margin(folder: str) -> float:
    rm, rows = GPMPipeline(folder), comparisons()
    assert rm.preference.head == "bt"
    scores = [rm.score_matrix(row["prompt"], [row["chosen"][0]["content"], row["rejected"][0]["content"]])[0, 1].item()
              for row in rows]  # fmt: skip
    return sum(scores) / len(scores)


@pytest.mark.parametrize("lora", [False, True])
def test_margins_are_those_of_trl(trained_by_trl, lora):
    folder, expected = trained_by_trl[lora]
    assert Path(folder, "adapter_config.json").exists() == lora
    assert abs(margin(folder) - expected) < 1e-5 < abs(expected)


def test_an_adapter_of_trl_is_merged_and_continued(trained_by_trl, tmp_path):
    folder, expected = trained_by_trl[True]
    merge_into_folder(folder, tmp_path / "merged")
    assert abs(margin(str(tmp_path / "merged")) - expected) < 1e-5
    continued = get_reward_model(folder, bf16=False)
    assert any("lora" in name for name, parameter in continued.named_parameters() if parameter.requires_grad)
    assert torch.equal(continued.value_head.weight, read_heads(folder)["value_head.weight"])


def openrlhf(folder: str, target: Path, **settings) -> str:
    """A folder as OpenRLHF leaves it: a backbone, a head by the name in its configuration, statistics of the reward."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.architectures = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    head = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(1))
    prefix = settings.setdefault("value_head_prefix", "score")
    change(target, add={f"{prefix}.weight": head}, settings=settings | {"architectures": ["RewardModel"]})
    return str(target)


def change(folder: Path, add=(), remove=(), settings=()) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in remove} | dict(add)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | dict(settings)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("prefix", ["score", "value_head", "reward"])
def test_value_heads_of_openrlhf(model_folder, tmp_path, prefix):
    plain = GPMPipeline(openrlhf(model_folder("llama"), tmp_path / "plain", value_head_prefix=prefix))
    rm = GPMPipeline(openrlhf(model_folder("llama"), tmp_path / "rm", value_head_prefix=prefix, mean=0.5, std=2.0))
    raw, normalized = (model.embed(PROMPTS, RESPONSES)[0].embeddings[:, 0] for model in (plain, rm))
    torch.testing.assert_close(normalized, (raw - 0.5) / 2)
    first, second = RESPONSES[0][:2]
    assert rm.compare(PROMPTS[0], first, second) == pytest.approx(plain.compare(PROMPTS[0], first, second), abs=1e-6)


@pytest.mark.parametrize("template", [TEMPLATE, CHAT_TEMPLATE, TEMPLATE.replace("<|end|>", "")])
def test_conversations_end_as_openrlhf_trains_them(model_folder, tmp_path, template):
    """Without new lines behind them, and with the end token, after a space where the template has none."""
    folder = openrlhf(model_folder("llama"), tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    rm, texts = GPMPipeline(folder), ["The rock.\n\n", ""]
    row = rm.encoder.encode([messages("Which?", "")[:1]], [[messages("", text)[1:] for text in texts]])[0]
    for ids, text in zip(row["response_ids"], texts, strict=True):
        written = tokenizer.apply_chat_template(messages("Which?", text), tokenize=False).rstrip("\n")
        written += "" if written.endswith(END) else " " + END
        assert row["prompt_ids"] + ids == tokenizer(written, add_special_tokens=False)["input_ids"]
    cut = GPMPipeline(folder, max_length=32).encoder.encode(
        [messages("Which?", "")[:1]], [[messages("", "rock " * 80)[1:]]]
    )
    assert cut[0]["response_ids"][0][-1] == tokenizer.eos_token_id and cut[0]["response_cut"]


def test_value_heads_of_llama_factory(model_folder, tmp_path):
    shutil.copytree(model_folder("llama"), tmp_path / "rm")
    head = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(1))
    tensors = {"v_head.summary.weight": head, "v_head.summary.bias": torch.tensor([0.25])}
    save_file(tensors, tmp_path / "rm" / "value_head.safetensors")
    rm = GPMPipeline(str(tmp_path / "rm"))
    reference = GPMPipeline(openrlhf(model_folder("llama"), tmp_path / "same"))
    reference.encoder = rm.encoder  # the same tokens
    for found, expected in zip(rm.embed(PROMPTS, RESPONSES), reference.embed(PROMPTS, RESPONSES), strict=True):
        torch.testing.assert_close(found.embeddings, expected.embeddings + 0.25)


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (
            lambda folder: change(folder, {"score.weight": torch.zeros(2, HIDDEN)}),
            "score.weight has 2 labels, but only",
        ),
        (lambda folder: change(folder, {"score.bias": torch.zeros(1)}), "holds score.bias, a part of a classifier"),
        (lambda folder: change(folder, {"pooler.dense.weight": torch.zeros(2, 2)}), "pooler.dense.weight, the pooling"),
        (
            lambda folder: change(folder, {"classifier.weight": torch.zeros(1, HIDDEN)}, ["score.weight"]),
            "classifier.weight, the head of an encoder",
        ),
        (cut_off, "model.safetensors is damaged or cut short"),
        (
            lambda folder: change(folder, settings={"architectures": None, "value_head_prefix": "score", "std": 0}),
            "std 0, expected std > 0",
        ),
        (lambda folder: change(folder, {"score.weight": torch.zeros(1, 8)}), "8.*describes has value_head.weight of"),
        (
            lambda folder: change(folder, settings={"architectures": None, "mean": 1e308, "std": 1e-10}),
            "the constant of the reward must be finite",
        ),
        (
            lambda folder: change(folder, (), ["score.weight"], {"value_head_prefix": "head"}),
            r"names its head in config.json \(value_head_prefix\), but holds no head.weight",
        ),
        (
            lambda folder: (change(folder, (), ["score.weight"]), (folder / "value_head.bin").touch()),
            r"holds pickle \(value_head.bin\), which is never loaded",
        ),
        (
            lambda folder: ((folder / "model.safetensors").unlink(), (folder / INDEX).write_text("{}")),
            "safetensors.index.json is damaged, it has no weight_map",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(model_folder, tmp_path, broken, said):
    folder = classifier(model_folder("llama"), tmp_path / "rm", PAD)
    broken(Path(folder))
    for load in (GPMPipeline, get_reward_model):
        with pytest.raises(InputError, match=said) as raised:
            load(folder)
        assert "\n" not in str(raised.value)


def test_transformers_reads_ours(saved, tmp_path):
    """Without an export; and what another tool trained further is no longer read as ours."""
    folder = Path(shutil.copytree(saved(head="bt", dim=1, gate=False), tmp_path / "rm"))
    change(folder, settings={"pad_token_id": AutoTokenizer.from_pretrained(folder).pad_token_id})  # as training does
    rm = GPMPipeline(str(folder))
    ids = [row["prompt_ids"] + row["response_ids"][0] for row in rm.encoder.encode([messages("", "")[:1]] * 2,
           [[messages("", text)[1:]] for text in ("The rock.", "The paper, the scissors")])]  # fmt: skip
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and model.config.num_labels == 1
    padded = AutoTokenizer.from_pretrained(folder).pad({"input_ids": ids}, return_tensors="pt")
    own = rm.embed(["", ""], [["The rock."], ["The paper, the scissors"]])
    torch.testing.assert_close(model.eval()(**padded).logits, torch.cat([one.embeddings for one in own]))
    torch.nn.init.constant_(model.score.weight, 0.1)
    model.save_pretrained(tmp_path / "further")
    rm.tokenizer.save_pretrained(tmp_path / "further")
    further = GPMPipeline(str(tmp_path / "further"))
    assert further.preference.input_format == "sequence_classification"
    assert torch.equal(further.model.value_head.weight, model.score.weight)


@pytest.mark.timeout(300)
def test_trl_trains_a_policy_on_ours(saved, model_folder, tmp_path):
    """GRPO with our folder as its reward model: the rewards that it logs are those of the pipeline."""
    from trl import GRPOConfig, GRPOTrainer

    folder = saved(head="bt", dim=1, gate=False)
    seen = []

    def pipeline_reward(prompts, completions, **_):
        rm = GPMPipeline(folder)
        embedded = rm.embed([one[0]["content"] for one in prompts], [[one[0]["content"]] for one in completions])
        seen.extend(completions)
        return [one.embeddings.item() for one in embedded]

    options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "max_steps": 2}
    config = GRPOConfig(
        str(tmp_path), report_to=[], save_strategy="no", use_cpu=True, bf16=False, logging_steps=1, **options
    )
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": text}]} for text in ("Name one.", "Which throw?")]
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder("qwen2"), padding_side="left")
    trainer = GRPOTrainer(
        model_folder("qwen2"), [folder, pipeline_reward], args=config, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logged) == 2 and len(seen) == 8
    for row in logged:
        first, second = (
            row[key] for key in sorted(key for key in row if key.startswith("rewards/") and key.endswith("mean"))
        )
        assert first == pytest.approx(second, abs=1e-4) and abs(first) > 1e-3


def test_both_evaluations_read_them(model_folder, tmp_path, own_environment):
    folder = classifier(model_folder("qwen3"), tmp_path / "rm", PAD)
    data, bench = tmp_path / "data.jsonl", tmp_path / "bench.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in comparisons()[:2]))
    bench.write_text("\n".join(map(json.dumps, pairs(1))))
    output = tmp_path / "results.jsonl"
    assert batch_inference(["--pretrain", folder, "--dataset", str(data), "--output_path", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    rm = GPMPipeline(folder)
    for row, record in zip(rows, comparisons(), strict=False):
        texts = [record[key][0]["content"] for key in ("chosen", "rejected")]
        assert row["score"] == pytest.approx(rm.score_matrix(record["prompt"], texts)[0, 1].item(), abs=1e-6)
    flags = ["--model", folder, "--dataset", str(bench), "--output_dir", str(tmp_path), "--model_name", "m"]
    assert rewardbench(flags) == 0
    for line, record in zip((tmp_path / "m.jsonl").read_text().splitlines(), pairs(1), strict=True):
        score = rm.score_matrix(record["prompt"], [record["chosen"], record["rejected"]])[0, 1].item()
        assert json.loads(line)["score"] == pytest.approx(score, abs=1e-5)


def rewards_by_transformers(folder: str, rm: GPMPipeline) -> torch.Tensor:
    """One padded batch of what the pipeline reads of `RESPONSES`."""
    prompts = [messages(prompt, "")[:-1] for prompt in PROMPTS]
    rows = rm.encoder.encode(prompts, [[[messages("", text)[1]] for text in some] for some in RESPONSES])
    ids = [row["prompt_ids"] + response for row in rows for response in row["response_ids"]]
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return model(**AutoTokenizer.from_pretrained(folder).pad({"input_ids": ids}, return_tensors="pt")).logits[:, 0]


@pytest.mark.parametrize("pad", ["no", "the end token"])
def test_a_merged_adapter_loads_in_transformers(model_folder, tmp_path, pad):
    base = Path(shutil.copytree(model_folder("llama"), tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None if pad == "no" else tokenizer.eos_token
    tokenizer.save_pretrained(base)
    change(base, settings={"pad_token_id": tokenizer.pad_token_id})
    model = get_reward_model(str(base), bf16=False, lora_rank=2)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_into_folder(str(tmp_path / "adapter"), tmp_path / "merged")
    rm = GPMPipeline(str(tmp_path / "merged"))
    own = torch.cat([one.embeddings[:, 0] for one in rm.embed(PROMPTS, RESPONSES)])
    assert (rewards_by_transformers(str(tmp_path / "merged"), rm) - own).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saves_again_stays_ours(saved, tmp_path, dtype):
    folder = Path(shutil.copytree(saved(head="bt", dim=1, gate=False), tmp_path / "rm"))
    ours = saved_preference(str(folder))
    AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path / "again")
    assert "value_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")
    assert saved_preference(str(tmp_path / "again")) == ours and ours.input_format == "chat"


def test_what_other_tools_train_further_is_theirs(saved, tmp_path, caplog):
    """One line says that settings are left out; two heads that differ are refused."""
    folder = Path(shutil.copytree(saved(head="bt", dim=1, gate=False), tmp_path / "rm"))
    change(folder, {"score.weight": torch.ones(1, HIDDEN)})
    with pytest.raises(InputError, match=r"holds value_head.weight and another score.weight: remove the one"):
        GPMPipeline(str(folder))
    change(folder, remove=["value_head.weight"])
    assert saved_preference(str(folder)).input_format == "openrlhf"  # as its configuration has it
    assert saved_preference(str(folder)) is not None and caplog.text.count("was trained further by another tool") == 1
    change(folder, remove=["score.weight"])
    summary = {"v_head.summary.weight": torch.ones(1, HIDDEN), "v_head.summary.bias": torch.zeros(1)}
    save_file(summary, folder / "value_head.safetensors")
    rm = GPMPipeline(str(folder))
    assert rm.preference.input_format == "sequence_classification" and (rm.model.value_head.weight == 1).all()


def test_older_folders_of_openrlhf(model_folder, tmp_path):
    """Without the prefix in their configuration: by the class of the model, or the statistics of its reward."""
    head = torch.ones(1, HIDDEN)
    for number, (name, settings) in enumerate(
        [("score.weight", {"architectures": ["RewardModel"]}), ("value_head.weight", {"mean": 3.0, "std": 2.0})]
    ):
        folder = Path(shutil.copytree(model_folder("llama"), tmp_path / str(number)))
        change(folder, {name: head}, settings=settings)
        found = saved_preference(str(folder))
        assert found.input_format == "openrlhf" and found.reward_offset == -settings.get("mean", 0) / 2


@pytest.mark.parametrize("kind", ["CriticModel", "LlamaForTokenClassification"])
def test_models_that_give_every_token_a_number_are_refused(model_folder, tmp_path, kind):
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "rm"))
    change(folder, {"score.weight": torch.ones(1, HIDDEN)}, settings={"architectures": [kind]})
    with pytest.raises(InputError, match=r"CriticModel|ForTokenClassification.*gives every token a number"):
        GPMPipeline(str(folder))


def test_small_traps_of_folders(model_folder, tmp_path):
    """A padding token of -1 is none, and the index of shards that are gone is not read."""
    folder = Path(classifier(model_folder("llama"), tmp_path / "rm", PAD))
    change(folder, settings={"pad_token_id": -1})
    assert saved_preference(str(folder)).pad_token_id is None
    index = {"metadata": {}, "weight_map": {"score.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert GPMPipeline(str(folder)).preference.head == "bt"


def test_the_gate_reads_the_same_whatever_the_responses_are(model_folder, tmp_path):
    """A response that begins with white space may share a token with the end of the prompt."""
    words = ["\n\n\nThe rock.", "<|assistant|>\nThe rock.", "<|user|>\nWhich throw wins?<|end|>\n"] * 4
    tokenizer = train_tokenizer(words, 300)
    tokenizer.chat_template = TEMPLATE
    encoder = ComparisonTokenizer(tokenizer, None, "sequence_classification")
    prompt, texts = messages("Which throw wins?", "")[:1], ["The rock.", "paper", "\n\nThe rock."]
    responses = [[messages("", text)[1]] for text in texts]
    few, all_of_them = (encoder.encode([prompt], [some])[0] for some in (responses[:2], responses))
    assert all_of_them["response_ids"][2][0] == tokenizer.convert_tokens_to_ids("ĊĊ"), "the trap is there"
    assert few["prompt_ids"] == all_of_them["prompt_ids"] and few["response_ids"] == all_of_them["response_ids"][:2]
