"""Folding an adapter into its base: the same scores, a folder that needs no peft, and one line for what cannot be."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from general_preference import RewardModel, preference_score
from general_preference.datasets.packing import Collator
from general_preference.errors import InputError
from general_preference.models.loading import merge_adapter
from tests.conftest import random_comparisons

pytest.importorskip("peft")
SCRIPT = str(Path(__file__).resolve().parents[1] / "scripts" / "merge_lora.py")


def scores(model):
    batch = Collator(0, model.layout_on())(random_comparisons(6, model.config.vocab_size))
    with torch.no_grad():
        output = model.eval()(**batch.model_inputs())
    embeddings = output["embeddings"]
    return preference_score(embeddings[batch.first], embeddings[batch.second], output["gates"][batch.comparison_index])


@pytest.fixture(scope="module")
def adapter(make_model, tokenizer, tmp_path_factory):
    """A folder as a LoRA run leaves it, after a few real steps, and the scores of what was trained."""
    model = make_model("llama", lora_rank=4).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    batch = Collator(0, model.layout_on())(random_comparisons(6, model.config.vocab_size))
    before = scores(model)
    for _ in range(4):
        output = model.train()(**batch.model_inputs())
        embeddings = output["embeddings"]
        score = preference_score(
            embeddings[batch.first], embeddings[batch.second], output["gates"][batch.comparison_index]
        )
        torch.nn.functional.softplus(-score / 0.1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (scores(model) - before).abs().max() > 0.05
    folder = tmp_path_factory.mktemp("merging") / "adapter"
    model.card.datasets, model.card.results = ["owner/some-set"], {"easy": {"accuracy": 0.75, "loss": 0.5, "n": 8}}
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder, scores(model)


def run(*arguments, **options):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_a_merged_model_scores_as_its_adapter(adapter, tmp_path):
    folder, trained = adapter
    done = run(folder, "merged", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    merged = tmp_path / "merged"
    files = {path.name for path in merged.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert not any("adapter" in name or "heads" in name for name in files)
    assert (merged / "README.md").read_text() == (folder / "README.md").read_text()
    model = RewardModel.from_pretrained(str(merged))
    assert not hasattr(model.backbone, "peft_config") and model.card.datasets == ["owner/some-set"]
    torch.testing.assert_close(scores(model), trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores(RewardModel.from_pretrained(str(folder))), trained, rtol=0, atol=1e-5)
    assert model.preference == RewardModel.from_pretrained(str(folder)).preference


def test_a_half_precision_copy_is_a_rounded_one(adapter, tmp_path):
    from safetensors.torch import load_file

    from scripts.merge_lora import merge

    folder, trained = adapter
    merge(str(folder), tmp_path / "half", "bfloat16")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if "head.weight" not in name} == {torch.bfloat16}
    assert tensors["value_head.weight"].dtype == torch.float32
    assert (scores(RewardModel.from_pretrained(str(tmp_path / "half"))) - trained).abs().max() < 0.2
    before = (tmp_path / "half" / "model.safetensors").stat().st_ino
    merge(str(folder), tmp_path / "half", skip_finished=True)
    assert (tmp_path / "half" / "model.safetensors").stat().st_ino == before
    (tmp_path / "half" / "merged_from.json").write_text('{"weights": "another"}')
    with pytest.raises(InputError, match="is not empty"):
        merge(str(folder), tmp_path / "half", skip_finished=True)


def test_adapters_on_fused_experts_and_routers_are_folded_too(make_model):
    model = make_model("mixtral", lora_rank=2)
    plain = scores(model)
    adapted = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert any("experts" in name for name in adapted) and any("mlp.gate." in name for name in adapted)
    for parameter in adapted.values():
        torch.nn.init.normal_(parameter.data, std=0.1)
    trained = scores(model)
    assert (trained - plain).abs().max() > 0.01
    merge_adapter(model)
    torch.testing.assert_close(scores(model), trained, rtol=0, atol=1e-5)


def test_what_cannot_be_merged_is_said_in_one_line(adapter, make_model, tmp_path, capsys):
    from scripts.merge_lora import main

    folder, _ = adapter
    make_model("llama").save_pretrained(tmp_path / "full")
    orphan = tmp_path / "orphan"
    orphan.mkdir()
    for file in folder.iterdir():
        (orphan / file.name).write_bytes(file.read_bytes())
    settings = (orphan / "adapter_config.json").read_text()
    base = settings.split('"base_model_name_or_path": "')[1].split('"')[0]
    (orphan / "adapter_config.json").write_text(settings.replace(base, "/nowhere/base"))
    cases = [
        (tmp_path / "full", tmp_path / "new", "is not an adapter: it has no adapter_config.json"),
        (tmp_path / "gone", tmp_path / "new", "does not exist"),
        (folder, tmp_path / "full", "exists and is not empty"),
        (orphan, tmp_path / "new", "model folder /nowhere/base does not exist"),
    ]
    for source, output, message in cases:
        assert main([str(source), str(output)]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1] and said[-1].startswith("error: ") and "Traceback" not in "".join(said)
        assert not (tmp_path / "new").exists()


def test_tied_embeddings_under_an_adapter_are_not_folded(make_model):
    model = make_model("gemma", lora_rank=2, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(InputError, match="the LM head as well"):
        merge_adapter(model)
    with pytest.raises(InputError, match="no adapter to fold in"):
        merge_adapter(make_model("llama"))
