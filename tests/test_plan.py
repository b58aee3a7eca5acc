"""What --plan prints: parameters of an empty model, memory by the arithmetic that it states, steps of the real data."""

import math

import pytest
import torch

from general_preference.trainer.arguments import parse_arguments
from general_preference.trainer.plan import count_parameters
from scripts.train_rm_general_preference import main
from tests.test_training import GPM, ROOT


def flags(model: str, *more: str) -> list[str]:
    return ["--pretrain", model, "--dataset", f"{ROOT}/data/cyclic/train.jsonl", "--max_len", "256", *GPM, *more]


@pytest.mark.parametrize("lora", [False, True])
def test_parameters_are_those_of_the_model(model_folder, make_model, lora):
    more = ["--lora_rank", "2"] if lora else []
    arguments = parse_arguments(flags(model_folder("llama"), *more))
    total, trained, largest = count_parameters(arguments, arguments.model.preference(256))
    model = make_model("llama", **({"lora_rank": 2} if lora else {}))
    model.freeze_unused(language_model_head=False)
    assert total == sum(weight.numel() for weight in model.parameters())
    assert trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert (
        largest == model.language_model.get_input_embeddings().weight.numel()
        and torch.get_default_device().type == "cpu"
    )


def test_the_plan_is_printed_and_nothing_is_started(model_folder, tmp_path, capsys):
    run = tmp_path / "run"
    more = [
        "--save_path",
        str(run),
        "--micro_train_batch_size",
        "4",
        "--accumulated_gradient",
        "8",
        "--max_epochs",
        "2",
    ]
    assert main(flags(model_folder("llama"), "--plan", "4", *more)) == 0
    said = capsys.readouterr().out
    arguments = parse_arguments(flags(model_folder("llama")))
    total, trained, _ = count_parameters(arguments, arguments.model.preference(256))
    rows = {
        tuple(line.split()[:2]): line.split()[2:]
        for line in said.splitlines()
        if line.split()[1:2] in (["no"], ["yes"])
    }
    assert len(rows) == 6 and float(rows["0", "no"][0]) == pytest.approx((18 * trained + 2 * total) / 1e9, abs=0.005)
    assert "Comparisons: 350, tokens per epoch: " in said
    assert f"Steps: {math.ceil(350 / 32) * 2} of 32 comparisons" in said and not run.exists()


def test_memory_falls_with_the_stage_and_with_more_gpus():
    from general_preference.trainer.deepspeed_engine import model_state_memory

    found = [model_state_memory(stage, 8 * 10**9, 8 * 10**9, 5 * 10**8, 8, 8, False)[0] for stage in range(4)]
    assert found[0] == 160 * 10**9 and found == sorted(found, reverse=True)
    more = [model_state_memory(stage, 8 * 10**9, 8 * 10**9, 5 * 10**8, 64, 8, False)[0] for stage in range(4)]
    assert more[0] == found[0] and all(a < b for a, b in zip(more[1:], found[1:], strict=True))
    frozen = model_state_memory(2, 8 * 10**9, 10**7, 5 * 10**8, 8, 8, False)[0]
    assert 2 * 8 * 10**9 < frozen < 2.01 * 8 * 10**9, "a frozen parameter takes two bytes"
