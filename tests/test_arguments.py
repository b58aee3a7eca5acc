"""Flags: the paper's are all there, contradictions are refused, secrets are not saved."""

import json
from pathlib import Path

import pytest
from setuptools import find_packages

from general_preference.errors import InputError
from general_preference.trainer.arguments import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
PAPER_FLAGS = """pretrain dataset dataset_probs save_path save_steps logging_steps eval_steps ckpt_path max_ckpt_num
max_ckpt_mem max_epochs micro_train_batch_size accumulated_gradient max_samples load_checkpoint max_norm max_len l2
gradient_checkpointing seed local_rank zero_stage bf16 learning_rate zpg adam_offload flash_attn compute_fp32_loss
margin_loss grad_accum_dtype disable_trace_cache load_in_4bit lora_rank lora_alpha lora_dropout target_modules
input_template gradient_checkpointing_use_reentrant disable_fast_tokenizer is_custom_dataset is_general_preference
general_preference_tau group_size value_head_dim save_best_model add_pretrain_loss ptx_loss_coef train_split_ratio
reward_scaler_beta reward_margin regression_target_margin return_prompt_length add_prompt_head use_wandb wandb_org
wandb_group wandb_project wandb_run_name""".split()  # noqa: SIM905


def parse(*flags):
    return parse_arguments(["--dataset", "x.jsonl", *flags])


def test_every_flag_of_the_paper_is_there_and_used():
    known = parse().to_dict()
    assert not set(PAPER_FLAGS) - set(known)
    code = "".join(
        path.read_text() for path in (ROOT / "general_preference").rglob("*.py") if path.name != "arguments.py"
    )
    code += (ROOT / "general_preference" / "datasets" / "arguments.py").read_text().split("def reading")[1]
    code += (ROOT / "scripts" / "train_rm_general_preference.py").read_text()
    own = (ROOT / "general_preference" / "trainer" / "arguments.py").read_text().split("def check")[1:]
    methods = (
        "".join(own) + (ROOT / "general_preference" / "trainer" / "arguments.py").read_text().split("def preference")[1]
    )
    set_by_launchers = {"local_rank", "compute_fp32_loss"}
    unread = [name for name in known if f".{name}" not in code + methods and name not in set_by_launchers]
    assert not unread, "a flag that nobody reads"


def test_heads_from_flags():
    def head(*flags):
        preference = parse(*flags).model.preference(512)
        return preference.head, preference.dim, preference.prompt_gate, preference.normalize, preference.temperature

    assert head() == ("bt", 1, False, False, 1.0)
    assert head("--is_general_preference") == ("gpm", 2, False, True, 0.1)
    assert head("--is_general_preference", "--value_head_dim", "6", "--add_prompt_head") == ("gpm", 6, True, True, 0.1)
    assert head("--preference_head", "hybrid", "--tau", "0.2") == ("hybrid", 3, False, True, 0.2)
    assert head("--preference_head", "gpm", "--normalize", "false")[3] is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--is_general_preference --value_head_dim 3", "even value_head_dim"),
        ("--add_prompt_head", "Bradley-Terry head has none"),
        ("--is_general_preference --preference_head bt", "drop one"),
        ("--value_head_dim 4", "dimension 1, not 4"),
        ("--loss regression --margin_loss", "regression_target_margin"),
        ("--flash_attn --attn_implementation sdpa", "disagree"),
        ("--load_in_4bit", "lora_rank"),
        ("--zpg 2 --zero_stage 2", "zero_stage 3"),
        ("--train_split_ratio 0", "above 0"),
        ("--train_split_ratio 1.5", "not exceed 1"),
        ("--save_best_model 2", "needs an evaluation"),
        ("--max_len 3", "at least 8"),
        ("--micro_train_batch_size 0", "at least 1"),
        ("--learning_rate -1", "must be at least 0"),
        ("--learning_rate nan", "must be at least 0"),
        ("--eval_steps 0", "or -1"),
        ("--group_size 2 --dataset x,y --dataset_probs 0.5,0.5", "drop one"),
        ("--ptx_loss_coef 2 --add_pretrain_loss", "between 0 and 1"),
    ],
)
def test_contradictions_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        arguments = parse(*flags.split())
        arguments.check()
        arguments.model.preference(512)


def test_unknown_flags_and_wrong_types_end_with_code_2(capsys):
    for flags in (["--no_such_flag"], ["--zero_stage", "7"], ["--max_len", "many"], ["--preten", "x"]):
        with pytest.raises(SystemExit) as stopped:
            parse(*flags)
        assert stopped.value.code == 2
        assert "error" in capsys.readouterr().err


def test_the_wandb_key_is_never_saved(tmp_path):
    arguments = parse("--use_wandb", "a-secret-key")
    arguments.save(tmp_path, world_size=1)
    text = (tmp_path / "arguments.json").read_text()
    assert "a-secret-key" not in text and json.loads(text)["use_wandb"] == "online"
    assert parse("--use_wandb", "offline").to_dict()["use_wandb"] == "offline"


def test_only_the_package_is_installed():
    packages = find_packages(str(ROOT), include=["general_preference", "general_preference.*"])
    assert "general_preference.models" in packages
    assert "include=[" in (ROOT / "setup.py").read_text()
    assert all(name.split(".")[0] == "general_preference" for name in packages)


def test_a_runs_own_arguments_repeat_it(tmp_path):
    flags = ["--preference_head", "hybrid", "--normalize", "false", "--lora_rank", "4", "--tau", "3e-1", "--bf16"]
    first = parse(*flags, "--target_modules", "q_proj", "v_proj", "--use_wandb", "online", "--dataset_probs", "0.4,0.6")
    first.save(tmp_path, world_size=2)
    assert parse_arguments(["--config", str(tmp_path / "arguments.json")]) == first
    plain = parse()
    plain.save(tmp_path)
    assert parse_arguments(["--config", str(tmp_path / "arguments.json")]) == plain
    again = parse_arguments(["--seed", "7", "--config", str(tmp_path / "arguments.json"), "--max_len", "64"])
    assert (again.optimizer.seed, again.data.max_len) == (7, 64), "flags win, before it and after it"


def test_a_head_on_the_command_line_replaces_that_of_a_config_file(tmp_path):
    config = tmp_path / "preset.yaml"
    config.write_text("is_general_preference: true\nvalue_head_dim: 6\ngeneral_preference_tau: 25e-2\nbf16: true\n")

    def head(*flags):
        model = parse_arguments(["--config", str(config), *flags]).model
        return model.is_general_preference, model.value_head_dim, model.general_preference_tau

    assert head() == (True, 6, 0.25)
    assert head("--value_head_dim", "4") == (True, 4, 0.25)
    assert head("--preference_head", "gpm") == (False, None, 0.25)
    assert head("--preference_head", "bt") == head("--keep_reward") == (False, None, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("- 1", "is not a mapping"),
        ("learning_rat: 1", "has unknown keys: learning_rat"),
        ("seed: much", "--seed: invalid int value: 'much'"),
        ("preference_head: x", "invalid choice: 'x'"),
    ],
)
def test_a_wrong_config_file_is_one_line(tmp_path, capsys, text, said):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--config", str(tmp_path / "config.yaml")])
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and said in shown and len(shown.splitlines()) == 1


def test_a_restarted_run_continues(monkeypatch):
    assert not parse().output.load_checkpoint
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert parse().output.load_checkpoint
