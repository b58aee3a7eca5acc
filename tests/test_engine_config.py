"""The DeepSpeed configuration: flags under DeepSpeed's own names, a user's file over them, contradictions refused."""

import json

import pytest

from general_preference.errors import InputError
from general_preference.trainer.arguments import parse_arguments
from general_preference.trainer.deepspeed_config import engine_config, offloads_optimizer, read_overrides, without_keys


def configured(flags="", overrides=None, on_gpu=True, world_size=2):
    arguments = parse_arguments(["--dataset", "x.jsonl", *flags.split()])
    arguments.check()
    return engine_config(
        arguments.engine, arguments.optimizer, on_gpu=on_gpu, world_size=world_size, overrides=overrides
    )


def test_flags_reach_deepspeed_under_its_own_names():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    plain = DeepSpeedConfig(configured("--zero_stage 1"))
    assert (plain.zero_config.stage, plain.gradient_clipping, plain.grad_accum_dtype) == (1, 1.0, None)
    assert plain.zero_config.offload_optimizer is None and plain.zero_config.zero_hpz_partition_size == 1
    assert plain.zero_config.prefetch_bucket_size > 0 and not plain.bfloat16_config.enabled
    flags = "--zero_stage 3 --zpg 2 --adam_offload --disable_trace_cache --grad_accum_dtype fp32 --max_norm 0.5"
    found = DeepSpeedConfig(configured(flags + " --bf16 --micro_train_batch_size 3 --accumulated_gradient 5"))
    zero = found.zero_config
    assert (zero.stage, zero.zero_hpz_partition_size, zero.offload_optimizer.device) == (3, 2, "cpu")
    assert (zero.prefetch_bucket_size, zero.max_live_parameters, zero.max_reuse_distance) == (0, 0, 0)
    assert (found.grad_accum_dtype, found.gradient_clipping, found.bfloat16_config.enabled) == ("fp32", 0.5, True)
    assert (found.train_micro_batch_size_per_gpu, found.gradient_accumulation_steps) == (3, 5)


def test_nothing_is_offloaded_from_a_cpu_to_its_own_memory():
    assert offloads_optimizer(configured("--adam_offload"))
    assert not offloads_optimizer(configured("--adam_offload", on_gpu=False))
    own = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert offloads_optimizer(configured(overrides=own)) and not offloads_optimizer(configured())
    assert not offloads_optimizer(configured(overrides=own, on_gpu=False))


def test_the_users_values_win_and_objects_are_merged():
    overrides = {"zero_optimization": {"reduce_bucket_size": 7, "overlap_comm": False}, "wall_clock_breakdown": True}
    plain, found = configured(), configured(overrides=overrides | {"flops_profiler": {"enabled": False}})
    expected = plain | {"wall_clock_breakdown": True, "flops_profiler": {"enabled": False}}
    expected["zero_optimization"] = plain["zero_optimization"] | {"reduce_bucket_size": 7, "overlap_comm": False}
    assert found == expected


def test_agreeing_values_and_autos_are_taken(tmp_path):
    config = {
        "train_batch_size": 32, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 1, "optimizer": "auto",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
    }  # fmt: skip
    file = tmp_path / "zero2.json"
    file.write_text(json.dumps(config))
    overrides = read_overrides(str(file))
    assert overrides["zero_optimization"] == {"stage": 2} and "optimizer" not in overrides
    found = configured("--accumulated_gradient 2", overrides)
    assert found["train_batch_size"] == 32 and found["bf16"] == {"enabled": False}
    assert found["train_micro_batch_size_per_gpu"] == 8


@pytest.mark.parametrize(
    ("overrides", "flags", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "", r"= 4, but micro_train_batch_size is 8: change one"),
        ({"gradient_accumulation_steps": 2}, "", r"= 2, but accumulated_gradient is 1"),
        ({"train_batch_size": 8}, "", r"= 8, but micro_train_batch_size \* .* processes is 16"),
        ({"gradient_clipping": 0.5}, "", r"= 0.5, but max_norm is 1.0"),
        ({"zero_optimization": {"stage": 3}}, "", r"stage = 3, but zero_stage is 2"),
        ({"bf16": {"enabled": True}}, "", r"enabled = true, but bf16 is false"),
        ({"bf16": {"enabled": False}}, "--bf16", r"enabled = false, but bf16 is true"),
        ({"zero_optimization": {"zero_hpz_partition_size": 4}}, "--zero_stage 3 --zpg 2", r"= 4, but zpg is 2"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "--grad_accum_dtype fp32", r'"bf16", but grad_accum_dtype'),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "",
            "offload_optimizer.device = nvme, which checkpoints do not reach",
        ),
        ({"fp16": {"enabled": True}}, "", r"fp16.enabled = true, which training here does not"),
        ({"torch_autocast": {"enabled": True}}, "", r"torch_autocast.enabled = true"),
        ({"optimizer": {"type": "Lion"}}, "", r"optimizer = .*, which training here does not"),
        ({"scheduler": {"type": "WarmupLR"}}, "", r"scheduler = .*, which training here does not"),
        ({"zero_optimization": True}, "", r"zero_optimization = true, which must be an object"),
    ],
)
def test_what_flags_decide_is_not_decided_twice(overrides, flags, message):
    with pytest.raises(InputError, match=message):
        configured(flags, overrides)


def test_a_monitors_key_is_not_saved():
    found = without_keys(configured(overrides={"comet": {"enabled": True, "api_key": "a-secret"}}))
    assert found == configured() | {"comet": {"enabled": True}}


def test_files_that_are_no_configuration(tmp_path):
    (tmp_path / "broken.json").write_text("{oops")
    (tmp_path / "list.json").write_text("[1]")
    cases = {"gone.json": r"cannot be read \(No such file", "broken.json": "is not JSON", "list.json": "holds list"}
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            read_overrides(str(tmp_path / name))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--adam_offload --zero_stage 0", "use --zero_stage 1 to 3, not 0"),
        ("--grad_accum_dtype bf16 --zero_stage 0", "must be fp32"),
        ("--grad_accum_dtype fp32 --zero_stage 0 --bf16", "must be bf16"),
    ],
)
def test_flags_that_need_partitions(flags, message):
    with pytest.raises(InputError, match=message):
        configured(flags)
