"""The first optimizer step through the real engine: one gradient, however memory and work are divided.

Starting processes costs many seconds, so two starts (one process, two processes) of engine_worker.py serve all checks.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from general_preference import RewardModel, preference_score
from general_preference.datasets.packing import Collator
from tests.conftest import random_comparisons
from tests.test_training import GPM, ROOT, forked

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

FULL = [*GPM, "--add_pretrain_loss", "--ptx_loss", "reference_free", "--learnable_temperature", "--margin_loss"]
EXPERTS = [*GPM, "--aux_loss_coef", "0.5"]
# name: (ZeRO stage, micro-batch, accumulation) of one process; the same global batch of 8 on two with half the share
DIVISIONS = {
    "whole": (0, 8, 1),
    "accumulated": (0, 1, 8),
    "zero2": (2, 8, 1),
    "zero2_accumulated": (2, 2, 4),
    "zero3": (3, 4, 2),
}


def one_process_runs(sparse: str) -> list[dict]:
    checkpointed = ["--zero_stage", "0", "--gradient_checkpointing", *FULL]
    experts = ["--zero_stage", "2", "--micro_train_batch_size", "4", "--accumulated_gradient", "2", *EXPERTS]
    return [
        {"name": "bt", "stage": 2, "flags": ["--zero_stage", "2"]},
        {"name": "lora", "stage": 2, "flags": ["--zero_stage", "2", *GPM, "--lora_rank", "2"], "save": "adapter"},
        {"name": "checkpointed", "stage": 0, "flags": checkpointed},
        {"name": "reentrant", "stage": 0, "flags": [*checkpointed, "--gradient_checkpointing_use_reentrant"]},
        {"name": "experts", "stage": 2, "flags": experts, "pretrain": sparse},
    ]


def two_process_runs(sparse: str, zero3: list[str]) -> list[dict]:
    lora = [*GPM, "--lora_rank", "2"]
    runs = [
        {"name": "zero3_hpz", "flags": [*zero3, *FULL, "--zpg", "2"]},
        {"name": "lora_partitioned", "flags": [*zero3, *lora], "save": "adapter"},
        {"name": "experts", "flags": [*zero3, *EXPERTS], "pretrain": sparse},
    ]
    if find_spec("bitsandbytes") is not None:
        runs.append({"name": "four_bits_zero3", "flags": [*zero3, *lora, "--load_in_4bit"]})
    runs = [run | {"stage": 3, "partitioned": True} for run in runs]
    if find_spec("bitsandbytes") is not None:
        zero2 = ["--zero_stage", "2", "--micro_train_batch_size", "4", *lora, "--load_in_4bit"]
        runs.append({"name": "four_bits_zero2", "stage": 2, "flags": zero2})
    return runs


def gradient_job(folder: Path, pretrain: str, sparse: str, world_size: int) -> dict:
    folder.mkdir()
    runs = []
    for name, (stage, micro, accumulation) in DIVISIONS.items():
        micro, accumulation = (micro // world_size, accumulation) if micro > 1 else (micro, accumulation // world_size)
        flags = ["--zero_stage", stage, "--micro_train_batch_size", micro, "--accumulated_gradient", accumulation]
        runs.append({"name": name, "stage": stage, "flags": [*map(str, flags), *FULL]})
    flags = ["--zero_stage", "3", "--micro_train_batch_size", str(8 // world_size)]
    (folder / "zero3.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    flags += ["--deepspeed_config", str(folder / "zero3.json")]  # then even the smallest tensors are partitioned
    runs.append({"name": "zero3_partitioned", "stage": 3, "flags": [*flags, *FULL], "partitioned": True})
    selective = [*flags, "--gradient_checkpointing", "--selective_checkpointing", *FULL]
    runs.append({"name": "selective_partitioned", "stage": 3, "flags": selective, "partitioned": True})
    runs += one_process_runs(sparse) if world_size == 1 else two_process_runs(sparse, flags)
    comparisons = random_comparisons(13, 290, seed=4)
    for comparison in comparisons:
        comparison["length"] = len(comparison["prompt_ids"]) + sum(map(len, comparison["response_ids"]))
    job = {"pretrain": pretrain, "output": str(folder), "runs": runs, "comparisons": comparisons}
    (folder / "job.json").write_text(json.dumps(job))
    done = forked(world_size, str(ROOT / "tests" / "engine_worker.py"), str(folder / "job.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(folder / "results.pt")
    return {name: result | {"folder": str(folder / "adapter")} for name, result in results.items()}


@pytest.fixture(scope="module")
def steps(model_folder, tmp_path_factory):
    """First steps of every division, on one process and on two."""
    base = tmp_path_factory.mktemp("steps")
    return {n: gradient_job(base / f"on{n}", model_folder("llama"), model_folder("mixtral"), n) for n in (1, 2)}


def difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    first, second = (torch.cat([part[name].flatten() for name in a]) for part in (a, b))
    return ((first - second).norm() / second.norm()).item()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("division", [*DIVISIONS, "zero3_partitioned"])
def test_one_gradient_however_it_is_divided(steps, division, world_size):
    reference, found = steps[1]["whole"], steps[world_size][division]
    assert difference(found["gradients"], reference["gradients"]) < 1e-5
    assert found["loss"] == pytest.approx(reference["loss"], rel=1e-5)


def test_partitioned_loading_never_holds_the_whole_backbone(steps):
    assert steps[1]["zero3_partitioned"]["held"] == 1
    for run in ("zero3_partitioned", "zero3_hpz"):
        assert steps[2][run]["held"] == pytest.approx(0.5, abs=0.01)
    assert steps[2]["zero3"]["held"] == 1, "without it every process loads all"


def test_secondary_partitions_change_nothing(steps):
    assert difference(steps[2]["zero3_hpz"]["gradients"], steps[1]["whole"]["gradients"]) < 1e-5


def test_adapters_learn_the_same_partitioned(steps):
    one, two = steps[1]["lora"], steps[2]["lora_partitioned"]
    assert difference(two["gradients"], one["gradients"]) < 1e-5
    assert two["changed"] == one["changed"] and two["held"] < 0.6
    for found in (one, two):  # the frozen base is not gathered
        assert set(found["saved"]) == set(found["trainable"])
        heads = [name for name in found["saved"] if "lora_" not in name]
        assert heads == ["prompt_head.weight", "value_head.weight"]


@pytest.mark.parametrize(("world_size", "run"), [(1, "lora"), (2, "lora_partitioned")])
def test_a_saved_adapter_scores_as_it_was_evaluated(steps, world_size, run):
    found = steps[world_size][run]
    model = RewardModel.from_pretrained(found["folder"])
    batch = Collator(0, model.layout_on())(random_comparisons(13, 290, seed=4))
    with torch.no_grad():
        output = model(**batch.model_inputs())
    embeddings, gates = output["embeddings"], output["gates"]
    score = preference_score(embeddings[batch.first], embeddings[batch.second], gates[batch.comparison_index])
    assert score.double().mean().item() == pytest.approx(found["evaluation"]["margin"], abs=1e-6)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_four_bits_learn_the_same_whole_and_partitioned(steps):
    two, three = steps[2]["four_bits_zero2"], steps[2]["four_bits_zero3"]
    assert difference(three["gradients"], two["gradients"]) < 1e-4
    assert three["changed"] == two["changed"] == steps[1]["lora"]["changed"]
    assert set(three["saved"]) == set(three["trainable"])


def test_experts_are_balanced_alike_one_after_the_other_and_side_by_side(steps):
    """The load-balancing loss is that of a micro-batch; both runs have the same two in their step."""
    one, two = steps[1]["experts"], steps[2]["experts"]
    assert difference(two["gradients"], one["gradients"]) < 1e-5
    assert set(one["changed"]) == set(one["trainable"]) == set(two["changed"])
    assert any("mlp.gate.weight" in name for name in one["changed"])
    aux = one["metrics"]["train/aux_loss"]
    assert two["metrics"]["train/aux_loss"] == pytest.approx(aux, rel=1e-5) and 2 < aux < 8
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert "train/aux_loss" not in steps[1]["whole"]["metrics"]


@pytest.mark.parametrize(
    ("world_size", "kind"),
    [(1, "checkpointed"), (1, "reentrant"), (1, "selective_partitioned"), (2, "selective_partitioned")],
)
def test_gradient_checkpointing_changes_nothing(steps, world_size, kind):
    assert difference(steps[world_size][kind]["gradients"], steps[1]["whole"]["gradients"]) < 1e-5


@pytest.mark.parametrize(
    ("world_size", "division"), [(1, "zero2"), (1, "zero3"), (2, "zero2"), (2, "zero3"), (1, "bt"), (1, "lora")]
)
def test_every_trainable_parameter_changes_in_one_step(steps, world_size, division):
    found = steps[world_size][division]
    # LoRA's B starts at zero, so A's first gradient is exactly zero.
    assert found["changed"] == [name for name in found["trainable"] if "lora_A" not in name]
    if division in ("zero2", "zero3"):
        assert {"value_head.weight", "prompt_head.weight", "temperature.log_value"} <= set(found["changed"])
    if division == "bt":
        assert not any("lm_head" in name for name in found["trainable"]), "unused without the regularizer"


def test_evaluation_does_not_depend_on_the_processes(steps):
    first = steps[1]["zero2"]["evaluation"]
    assert first["n"] == sum(len(c["first"]) for c in random_comparisons(13, 290, seed=4))
    for world_size, division in [(1, "zero3"), (2, "zero2"), (2, "zero3"), (2, "accumulated")]:
        found = steps[world_size][division]["evaluation"]
        assert found.keys() == first.keys() and found["n"] == first["n"] and found["ties"] == first["ties"]
        for name, value in first.items():
            assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
