"""Exported models: other tools' classes give the numbers of our heads; what cannot be exported is refused by name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3Config,
    GraniteConfig,
)

from general_preference import GPMPipeline, get_reward_model
from general_preference.errors import InputError
from general_preference.inference.export import FORMATS, export_model
from general_preference.models.config import PreferenceConfig, tensor_files
from scripts.export_model import main
from tests.conftest import COMMON, HIDDEN

SCRIPT = str(Path(__file__).resolve().parents[1] / "scripts" / "export_model.py")
PROMPT, RESPONSES = "Which throw wins?", ["The rock.", "The paper, the scissors äöü 你好.", ""]
HEADS = {"bt": ("bt", 1, False), "gate": ("gpm", 4, True), "hybrid": ("hybrid", 3, True)}


def sequences(rm: GPMPipeline) -> list[list[int]]:
    """Token ids of the prompt alone, and of the prompt with each response."""
    messages = [{"role": "user", "content": PROMPT}], [[{"role": "assistant", "content": one}] for one in RESPONSES]
    row = rm.encoder.encode([messages[0]], [messages[1]])[0]
    return [row["prompt_ids"], *(row["prompt_ids"] + ids for ids in row["response_ids"])]


@torch.no_grad()
def numbers(rm: GPMPipeline) -> torch.Tensor:
    """(1 + K, D + P) what the value head and the prompt head make of the last tokens of `sequences`."""
    heads = [head for head in (rm.model.value_head, rm.model.prompt_head) if head is not None]
    rows = []
    for ids in sequences(rm):
        state = rm.model.text_layers(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        rows.append(torch.cat([head(state) for head in heads]))
    return torch.stack(rows)


@torch.no_grad()
def logits(folder: Path, rm: GPMPipeline) -> torch.Tensor:
    """(1 + K, labels) of transformers' own class, in one padded batch."""
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    batch = AutoTokenizer.from_pretrained(folder).pad({"input_ids": sequences(rm)}, return_tensors="pt")
    return model.eval()(**batch).logits


@torch.no_grad()
def embedded(folder: Path, rm: GPMPipeline) -> torch.Tensor:
    """(1 + K, D + P) by the files that sentence-transformers reads: layers, pooling of the last token, dense layer."""
    kinds = [(module["path"], module["type"].split(".")[-1]) for module in json.loads(read(folder, "modules.json"))]
    assert kinds == [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")], "and nothing normalizes"
    pooling = json.loads(read(folder, "1_Pooling/config.json"))
    assert [mode for mode, used in pooling.items() if used is True and "mode" in mode] == ["pooling_mode_lasttoken"]
    dense, weight = json.loads(read(folder, "2_Dense/config.json")), load_file(folder / "2_Dense/model.safetensors")
    assert not dense["bias"] and dense["activation_function"] == "torch.nn.modules.linear.Identity"
    weight = weight["linear.weight"]
    sizes = dense["out_features"], dense["in_features"]
    assert weight.dtype == torch.float32 and weight.shape == sizes
    assert pooling["word_embedding_dimension"] == dense["in_features"]
    model, info = AutoModel.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"])
    states = [model.eval()(torch.tensor([ids])).last_hidden_state[0, -1] for ids in sequences(rm)]
    return torch.stack(states) @ weight.T


def read(folder: Path, name: str) -> str:
    return (folder / name).read_text(encoding="utf-8")


def assert_same_scores(folder: Path, source: str) -> GPMPipeline:
    """GPMPipeline gives the same bits for both."""
    rm, original = GPMPipeline(folder), GPMPipeline(source)
    assert rm.preference == original.preference and rm.model.dtype == original.model.dtype
    assert torch.equal(rm.score_matrix(PROMPT, RESPONSES), original.score_matrix(PROMPT, RESPONSES))
    ours, theirs = (one.embed([PROMPT], [RESPONSES])[0] for one in (rm, original))
    assert torch.equal(ours.embeddings, theirs.embeddings)
    return rm


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_labels_are_the_numbers_of_our_heads(saved, tmp_path, family, head, capsys):
    source = saved(family, *HEADS[head])
    export_model(source, tmp_path / "out", "sequence_classification")
    rm = assert_same_scores(tmp_path / "out", source)
    expected, found = numbers(rm), logits(tmp_path / "out", rm)
    with capsys.disabled():
        print(f"\n{family} {head}: labels differ by at most {(found - expected).abs().max():.1e}")
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_configuration_says_what_the_labels_are(saved, tmp_path):
    source = saved("llama", *HEADS["hybrid"])
    preference, architecture = export_model(source, tmp_path / "out", "sequence_classification")
    config = json.loads(read(tmp_path / "out", "config.json"))
    assert config["architectures"] == [architecture] == ["LlamaForSequenceClassification"]
    assert list(config["id2label"].values()) == ["embedding_0", "embedding_1", "reward", "gate_0"]
    assert config["problem_type"] == "regression" and config["preference"]["dim"] == preference.dim == 3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["score.weight"].shape == (4, HIDDEN) and not any("head" in name for name in tensors)
    assert len({file.stat().st_mode for file in (tmp_path / "out").rglob("*") if file.is_file()}) == 1


def test_a_tokenizer_that_pads_with_its_end_token_pads_with_another(saved, tmp_path):
    source = Path(shutil.copytree(saved("llama", *HEADS["gate"]), tmp_path / "source"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(source)
    export_model(str(source), tmp_path / "out", "sequence_classification")
    rm = assert_same_scores(tmp_path / "out", str(source))
    torch.testing.assert_close(logits(tmp_path / "out", rm), numbers(rm), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "head"), [("llama", "gate"), ("gpt2", "bt"), ("gemma2", "hybrid")])
def test_sentence_transformers_by_its_files(saved, tmp_path, family, head):
    source = saved(family, *HEADS[head])
    export_model(source, tmp_path / "out", "sentence_transformers")
    rm = GPMPipeline(source)
    torch.testing.assert_close(embedded(tmp_path / "out", rm), numbers(rm), rtol=0, atol=1e-5)
    assert "lm_head.weight" not in tensor_files(str(tmp_path / "out"))
    with pytest.raises(InputError, match="is an export for sentence-transformers: use the model"):
        GPMPipeline(tmp_path / "out")


def test_stored_dtypes_are_kept(saved, tmp_path):
    """Also where norms are in fp32 and the rest is not; the heads always are."""
    source = Path(shutil.copytree(saved("llama", *HEADS["gate"]), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    half = {name: one if "norm" in name or "_head." in name else one.half() for name, one in tensors.items()}
    save_file(half, source / "model.safetensors", metadata={"format": "pt"})
    for format in FORMATS:
        export_model(str(source), tmp_path / format, format)
        kept = load_file(tmp_path / format / "model.safetensors")
        for name in kept.keys() - {"score.weight"}:
            assert kept[name].dtype == half[name].dtype and torch.equal(kept[name], half[name])
    assert_same_scores(tmp_path / FORMATS[0], str(source))
    assert load_file(tmp_path / FORMATS[0] / "model.safetensors")["score.weight"].dtype == torch.float32


def test_shards_are_read_and_written(saved, make_model, tmp_path):
    source = Path(shutil.copytree(saved("llama", *HEADS["gate"]), tmp_path / "source"))
    (source / "model.safetensors").unlink()
    make_model("llama").save_pretrained(source, max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    export_model(str(source), tmp_path / "out", "sequence_classification", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    rm = assert_same_scores(tmp_path / "out", str(source))
    torch.testing.assert_close(logits(tmp_path / "out", rm), numbers(rm), rtol=0, atol=1e-5)


def test_what_is_trained_further_is_no_longer_ours(saved, tmp_path):
    for head, said in (("gate", "score.weight has 6 labels"), ("bt", None)):
        folder = tmp_path / head
        export_model(saved("llama", *HEADS[head]), folder, "sequence_classification")
        tensors = load_file(folder / "model.safetensors")
        tensors["score.weight"][0, 0] += 1e-4
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if said is None:  # a reward model of another tool
            assert GPMPipeline(folder).preference.input_format == "sequence_classification"
            continue
        with pytest.raises(InputError, match=said):
            GPMPipeline(folder)


def test_a_run_continues_an_exported_head(saved, tmp_path):
    source = saved("llama", *HEADS["gate"])
    export_model(source, tmp_path / "out", "sequence_classification")
    model, original = (get_reward_model(str(path), bf16=False) for path in (tmp_path / "out", source))
    assert model.preference == original.preference
    for head in ("value_head", "prompt_head"):
        assert torch.equal(getattr(model, head).weight, getattr(original, head).weight)
    model.save_pretrained(tmp_path / "further")
    assert "preference_digest" not in read(tmp_path / "further", "config.json")
    assert "score.weight" not in tensor_files(str(tmp_path / "further"))


def test_rewards_of_others_keep_their_scale_and_padding(model_folder, tmp_path):
    """OpenRLHF's statistics: the weights are in units of std, and the mean is named."""
    source = Path(shutil.copytree(model_folder("llama"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["score.weight"] = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(1))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(read(source, "config.json"))
    config |= {"architectures": ["RewardModel"], "value_head_prefix": "score", "mean": 0.5, "std": 2.0}
    (source / "config.json").write_text(json.dumps(config))
    export_model(str(source), tmp_path / "out", "sequence_classification")
    rm = assert_same_scores(tmp_path / "out", str(source))
    rewards = logits(tmp_path / "out", rm)[1:] - 0.25
    torch.testing.assert_close(rewards, rm.embed([PROMPT], [RESPONSES])[0].embeddings, rtol=0, atol=1e-5)
    assert "without its constant -0.25" in read(tmp_path / "out", "README.md")


def test_an_adapter_is_merged_in_a_real_process(make_model, tokenizer, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    model = make_model("llama", lora_rank=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    flags = ["adapter", "out", "--format", "sequence_classification"]
    done = subprocess.run([sys.executable, SCRIPT, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("(sequence_classification, LlamaForSequenceClassification)")
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "exists and is not empty" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]
    assert not any("adapter" in path.name or "merged" in path.name for path in (tmp_path / "out").rglob("*"))
    rm, adapter = GPMPipeline(tmp_path / "out"), GPMPipeline(tmp_path / "adapter")
    scores = [one.score_matrix(PROMPT, RESPONSES) for one in (rm, adapter)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(tmp_path / "out", rm), numbers(rm), rtol=0, atol=1e-5)


def a_model(config, tokenizer, folder: Path, kind=AutoModelForCausalLM) -> str:
    """A trained model with another backbone."""
    kind.from_config(config).save_pretrained(folder / "base")
    preference = PreferenceConfig("gpm", 4, True, normalize=True, temperature=0.1)
    get_reward_model(str(folder / "base"), bf16=False, preference=preference).save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    return str(folder / "rm")


def test_an_architecture_that_transformers_does_not_classify_with(tokenizer, tmp_path):
    source = a_model(GraniteConfig(vocab_size=len(tokenizer), **COMMON), tokenizer, tmp_path)
    with pytest.raises(InputError, match="no class for sequence classification with granite models"):
        export_model(source, tmp_path / "out", "sequence_classification")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".writing*"))
    export_model(source, tmp_path / "out", "sentence_transformers")
    rm = GPMPipeline(source)
    torch.testing.assert_close(embedded(tmp_path / "out", rm), numbers(rm), rtol=0, atol=1e-5)


def test_an_lm_head_of_another_name_on_disk(saved, tmp_path):
    source = saved("gpt_neox", *HEADS["gate"])
    assert "embed_out.weight" in tensor_files(source)
    for format, numbers_of in zip(FORMATS, (logits, embedded), strict=True):
        export_model(source, tmp_path / format, format)
        assert "embed_out.weight" not in tensor_files(str(tmp_path / format))
        rm = GPMPipeline(source)
        torch.testing.assert_close(numbers_of(tmp_path / format, rm), numbers(rm), rtol=0, atol=1e-5)


def test_a_model_that_reads_images_too(tokenizer, tmp_path):
    text = COMMON | {"vocab_size": 300, "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    source = a_model(config, tokenizer, tmp_path, AutoModelForImageTextToText)
    with pytest.raises(InputError, match="reads images too"):
        export_model(source, tmp_path / "out", "sentence_transformers")
    export_model(source, tmp_path / "out", "sequence_classification")
    rm = assert_same_scores(tmp_path / "out", source)
    torch.testing.assert_close(logits(tmp_path / "out", rm), numbers(rm), rtol=0, atol=1e-5)


def test_what_cannot_be_exported_is_said(saved, model_folder, tmp_path):
    source = saved("llama", *HEADS["gate"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    cases = [
        (source, "out", "onnx", "unknown format 'onnx': choose one of sequence_classification"),
        (source, "full", FORMATS[0], "exists and is not empty"),
        (model_folder("llama"), "out", FORMATS[0], "a plain language model without value_head"),
        (str(tmp_path / "gone"), "out", FORMATS[1], "does not exist"),
    ]
    for path, output, format, said in cases:
        with pytest.raises(InputError, match=said):
            export_model(path, tmp_path / output, format)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    for number, (change, said) in enumerate(
        [
            (
                {"model.norm.weight": torch.full((HIDDEN,), torch.nan)},
                "model.norm.weight holds numbers that are not fin",
            ),
            ({"prompt_head.weight": torch.full((2, HIDDEN), torch.inf)}, "the head holds numbers that are not finite"),
            (
                {"value_head.weight": torch.zeros(6, HIDDEN)},
                r"holds heads of shape \(8, 32\), but GPM D=4 with gate has",
            ),
        ]
    ):
        broken = Path(shutil.copytree(source, tmp_path / f"broken{number}"))
        tensors = load_file(broken / "model.safetensors") | change
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        for format in FORMATS:
            with pytest.raises(InputError, match=said):
                export_model(str(broken), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="which is read"):
        export_model(source, Path(source), FORMATS[0])


def test_the_card_says_how_to_use_it(saved, tmp_path):
    export_model(saved("llama", *HEADS["hybrid"]), tmp_path / "a", "sequence_classification")
    export_model(saved("llama", *HEADS["bt"]), tmp_path / "b", "sentence_transformers")
    card = read(tmp_path / "a", "README.md")
    for said in (
        "vllm serve OUT --runner pooling ",
        'RemotePreference("http://127.0.0.1:8000", "OUT")',
        "`<|end|>` (id 5)",
        "- 0 to 1: the embedding e of a response, divided by its L2 norm\n- 2: the reward r of a response\n"
        "- 3 to 3: of the gate's text, the logits z of its planes: gate = softmax(z)",
        "score = Σ_p gate[p] * (e1[2p] * e2[2p+1] - e1[2p+1] * e2[2p]) + r1 - r2",
        "P(first is preferred) = sigmoid(score / 0.1)",
    ):
        assert said in card
    card = read(tmp_path / "b", "README.md")
    assert "--convert embed" in card and "gate" not in card and "score = r1 - r2" in card
