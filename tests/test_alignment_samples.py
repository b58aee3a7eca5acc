"""The first two stages of policy alignment: their files are complete or absent, and the same however they are made."""

import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from general_preference import GPMPipeline
from general_preference.alignment.generation import InverseSampler, Sampling, draws_of, make_batches
from general_preference.alignment.prompts import Prompt, parse_prompt_record, read_prompts
from general_preference.alignment.samples import join, read_samples, read_scores, samples_checksum
from general_preference.alignment.scoring import score_row, summarize_scores
from general_preference.datasets.reading import Reading
from general_preference.datasets.sources import Source
from general_preference.datasets.tokenization import ComparisonTokenizer, load_tokenizer
from general_preference.errors import InputError
from general_preference.inference.batch import ResultStore
from general_preference.inference.embedding import EmbeddedPrompt
from scripts import generate_responses, score_responses
from tests.forks import ENVIRONMENT, fork_group, run_forks

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("own_environment")
SCRIPT = str(ROOT / "scripts" / "generate_responses.py")
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Which throw?"}]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    """A random model that ends about every third response within 24 tokens: its end token is made likely."""
    folder = tmp_path_factory.mktemp("policy") / "tiny"
    command = [sys.executable, str(ROOT / "scripts" / "make_tiny_model.py"), str(folder), "--hidden_size", "16"]
    subprocess.run([*command, "--vocab_size", "270"], check=True, capture_output=True, timeout=120)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.6)
    model.save_pretrained(folder)
    settings = {"eos_token_id": [5, 9], "do_sample": True, "top_k": 1, "min_new_tokens": 12}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def records() -> list[dict]:
    """Prompts of every shape; the last two repeat earlier ones."""
    rows = [{"id": f"p{i}", "prompt": f"Which throw wins, {'really ' * (i % 7)}number {i}?"} for i in range(14)]
    rows.append({"id": "messages", "prompt": MESSAGES})
    rows.append({"id": "talk", "messages": [MESSAGES[1], {"role": "assistant", "content": "rock"}]})
    rows.append({"id": "pair", "prompt": "Which?", "chosen": "a", "rejected": "b"})
    rows.append({"id": "again", "prompt": "Which throw?"})
    rows.append({"id": "same", "prompt": "Which?"})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, records())))
    return file


def flags(policy, data, output, *others) -> list[str]:
    given = ["--policy", policy, "--prompts", data, "--output", output, "--samples", 3, "--max_new_tokens", 12]
    return [*map(str, given), "--batch_tokens", "600", *map(str, others)]


def generate(*given) -> int:
    return generate_responses.main(flags(*given))


@pytest.fixture(scope="module")
def made(policy, data, tmp_path_factory) -> Path:
    """Samples that one process made without a stop."""
    output = tmp_path_factory.mktemp("made") / "samples.jsonl"
    before = dict(os.environ)
    assert generate(policy, data, output) == 0
    os.environ.clear()
    os.environ.update(before)
    return output


@pytest.fixture(scope="module")
def scored(made, saved, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("scored") / "scored.jsonl"
    before = dict(os.environ)
    assert score_responses.main(["--model", saved(), "--samples", str(made), "--output", str(output)]) == 0
    os.environ.clear()
    os.environ.update(before)
    return output


def test_every_prompt_once_with_tokens_that_say_what_the_text_says(policy, made):
    rows, tokenizer = read_samples(made), AutoTokenizer.from_pretrained(policy)
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(14)] + ["messages", "talk", "pair"]
    finished = [end for row in rows for end in row["finished"]]
    assert True in finished and False in finished
    for row in rows:
        messages = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert row["prompt_ids"] == asked and asked.count(tokenizer.bos_token_id) == 1
        assert [len(row[name]) for name in ("responses", "response_ids", "finished")] == [3, 3, 3]
        for text, ids, end in zip(row["responses"], row["response_ids"], row["finished"], strict=True):
            assert end == (ids[-1] in (5, 9)) and not {5, 9} & set(ids[:-1])
            assert len(ids) == 12 or (end and len(ids) < 12)
            assert tokenizer.decode(ids[:-1] if end else ids, clean_up_tokenization_spaces=False) == text
    assert rows[14]["prompt"] == MESSAGES and rows[15]["prompt"] == "Which throw?"
    summary = json.loads(made.with_name("samples.summary.json").read_text())
    tokens = sum(len(ids) for row in rows for ids in row["response_ids"])
    assert (summary["prompts"], summary["responses"], summary["tokens"]) == (17, 51, tokens)
    assert summary["unfinished_share"] == finished.count(False) / 51
    assert summary["read"] == {"records": 19, "left_out": 0, "repeated": 2, "too_long": 0}
    settings = summary["settings"]
    assert settings["asked"]["policy"] == policy and settings["stop_ids"] == [5, 9] and settings["samples"] == 3


def test_settings_of_the_folder_do_not_bend_the_samples(made):
    """With min_new_tokens and top_k of generation_config.json none would end early, and most would be the same."""
    responses = [tuple(ids) for row in read_samples(made) for ids in row["response_ids"]]
    assert min(map(len, responses)) < 12 and len(set(responses)) > 40


def test_every_response_has_random_numbers_of_its_own():
    sampling = Sampling(2, 1.0, 1.0, 10, 7, (5,))
    some, other = (draws_of([Prompt(name, [], {}, [1])], sampling, torch.device("cpu")) for name in ("a", "b"))
    both = draws_of([Prompt(name, [], {}, [1]) for name in ("b", "a")], sampling, torch.device("cpu"))
    assert torch.equal(both, torch.cat([other, some])) and len(both.unique()) == 40
    more = draws_of([Prompt("a", [], {}, [1])], Sampling(3, 1.0, 1.0, 20, 7, (5,)), torch.device("cpu"))
    assert torch.equal(more[:2, :10], some) and more.min() >= 0 and more.max() < 1


def test_a_row_depends_on_its_id_and_seed_and_place_alone(policy, data, made, tmp_path):
    """Fewer samples, other batches and fewer prompts: what remains is the same (rounding changes no token here)."""
    expected = {row["id"]: row["response_ids"] for row in read_samples(made)}
    assert generate(policy, data, tmp_path / "a.jsonl", "--samples", 2, "--batch_tokens", 2000, "--max_prompts", 9) == 0
    rows = read_samples(tmp_path / "a.jsonl")
    assert len(rows) == 9 and all(row["response_ids"] == expected[row["id"]][:2] for row in rows)
    assert generate(policy, data, tmp_path / "b.jsonl", "--seed", 1) == 0
    other = {row["id"]: row["response_ids"] for row in read_samples(tmp_path / "b.jsonl")}
    assert sum(other[name] == expected[name] for name in expected) == 0


def test_draws_follow_the_distribution():
    """Against probabilities by hand: of 20,000 draws the shares are within five standard errors."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(-1)
    draws = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, scores = torch.zeros(20_000, 7, dtype=torch.long), logits.repeat(20_000, 1)
    for temperature, top_p, kept in ((1.0, 1.0, 4), (0.5, 1.0, 4), (2.0, 1.0, 4), (1.0, 0.7, 2), (1.0, 0.64, 1)):
        chosen = InverseSampler(draws, 7, temperature, top_p)(ids, scores).argmax(-1)
        expected = torch.softmax(logits[0] / temperature, -1)
        expected[kept:] = 0
        expected /= expected.sum()
        shares = torch.bincount(chosen, minlength=4) / 20_000
        error = (expected * (1 - expected) / 20_000).sqrt()
        assert ((shares - expected).abs() <= 5 * error).all(), (temperature, top_p, shares, expected)


def test_batches_hold_what_fits_and_every_prompt_once():
    prompts = [Prompt(str(i), [], {}, [1] * length) for i, length in enumerate((3, 50, 3, 20, 7, 200))]
    sampling = Sampling(2, 1.0, 1.0, 10, 0, (5,))
    batches = make_batches(prompts, sampling, 130)
    assert batches == [[5], [1], [3, 4], [0, 2]], "(20 + 10) * 4 = 120 fits, (20 + 10) * 6 does not; 200 is alone"


def test_a_second_run_generates_nothing_and_other_settings_are_refused(policy, data, tmp_path, capsys, monkeypatch):
    output = tmp_path / "s.jsonl"
    assert generate(policy, data, output) == 0
    content = output.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(generate_responses.generation, "load_policy", lambda *_: pytest.fail("it was finished"))
        assert generate(policy, data, output) == 0
    assert output.read_bytes() == content
    assert generate(policy, data, output, "--temperature", 0.7) == 2
    assert "temperature = 1.0, now 0.7" in capsys.readouterr().err and output.read_bytes() == content
    assert generate(policy, data, output, "--temperature", 0.7, "--overwrite") == 0 and output.read_bytes() != content


@pytest.mark.timeout(300)
def test_two_processes_and_a_kill_give_the_bytes_of_one(policy, data, made, tmp_path):
    output, part = tmp_path / "s.jsonl", tmp_path / "s.jsonl.parts"
    command, log = [SCRIPT, *flags(policy, data, output)], tmp_path / "log"
    workers = fork_group(2, command, os.environ | ENVIRONMENT, log, log)
    while all(worker.is_alive() for worker in workers) and not any(map(Path.read_bytes, part.glob("part-*.jsonl"))):
        time.sleep(0.002)
    for worker in workers:
        worker.kill()
        worker.join()
    assert [worker.exitcode for worker in workers] == [-9, -9] and not output.exists()
    with (part / "part-0.jsonl").open("a") as file:
        file.write('3\t{"id": "p3", "pro')  # as a kill in the middle of a line leaves it
    second = run_forks(2, command, os.environ | ENVIRONMENT)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "2 process(es)" in second.stderr
    assert output.read_bytes() == made.read_bytes()
    assert output.with_name("s.summary.json").read_bytes() == made.with_name("samples.summary.json").read_bytes()


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_a_batch_that_was_cut_short_is_made_again_as_it_was(policy, data, made, tmp_path, monkeypatch, rows):
    append, count = ResultStore.append, [0]

    def stops(store, index, row):
        if count[0] == rows:
            raise KeyboardInterrupt
        count[0] += 1
        append(store, index, row)

    with monkeypatch.context() as patch:
        patch.setattr(ResultStore, "append", stops)
        assert generate(policy, data, tmp_path / "s.jsonl") == 130
    with pytest.raises(InputError, match="is not finished"):
        read_samples(tmp_path / "s.jsonl")
    assert generate(policy, data, tmp_path / "s.jsonl") == 0
    assert (tmp_path / "s.jsonl").read_bytes() == made.read_bytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--temperature", "0"], "--temperature 0.0 must be above 0"),
        (["--top_p", "1.5"], "--top_p 1.5"),
        (["--seed", "-1"], "--seed -1 must be from 0 to 4294967295"),
        (["--policy", "/nowhere/model"], "/nowhere/model does not exist"),
        (["--policy", "NO_TEMPLATE"], "has no chat template"),
        (["--policy", "NO_BASE"], "its base model cannot be used"),
        (["--policy", "REWARD"], "head"),
        (["--policy", "SMALL"], "but the policy has 60 embeddings"),
        (["--prompts", "/nowhere/x.jsonl"], "/nowhere/x.jsonl does not exist"),
        (["--max_new_tokens", "2030"], "prompt p0 has"),
        (["--max_prompt_tokens", "2"], "too_long=17"),
        (["--output", "x.json"], "ends in .jsonl"),
        (["--output", "PROMPTS"], "is"),
        (["--engine", "vllm", "--vllm_options", "[1]"], "must be an object"),
        (["--vllm_options", '{"model": "other"}'], "names a model, but --policy does"),
        (["--vllm_options", '{"max_model_len": 9}'], "are not read by engine transformers: set GENERATE_PYTHON"),
    ],
)
def test_what_cannot_be_used_is_one_line(policy, data, tmp_path, saved, tokenizer, capsys, given, message):
    def folder(name, **files) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        for file, text in files.items():
            (tmp_path / name / f"{file}.json").write_text(text)
        return str(tmp_path / name)

    if "NO_TEMPLATE" in given:
        bare = AutoTokenizer.from_pretrained(policy)
        bare.chat_template = None
        bare.save_pretrained(folder("bare"))
        AutoModelForCausalLM.from_pretrained(policy).save_pretrained(folder("bare"))
        given = ["--policy", folder("bare")]
    if "NO_BASE" in given:
        given = ["--policy", folder("adapter", adapter_config='{"base_model_name_or_path": "/nowhere/base"}')]
        tokenizer.save_pretrained(given[1])
    if "REWARD" in given:
        from transformers import AutoModelForSequenceClassification

        AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1).save_pretrained(folder("reward"))
        AutoTokenizer.from_pretrained(policy).save_pretrained(folder("reward"))
        config = json.loads((tmp_path / "reward" / "config.json").read_text()) | {"tie_word_embeddings": False}
        given = ["--policy", folder("reward", config=json.dumps(config))]
    if "SMALL" in given:
        small = AutoModelForCausalLM.from_pretrained(policy)
        small.resize_token_embeddings(60)
        small.save_pretrained(folder("small"))
        AutoTokenizer.from_pretrained(policy).save_pretrained(folder("small"))
        given = ["--policy", folder("small")]
    given = [str(data) if flag == "PROMPTS" else flag for flag in given]
    assert generate(policy, data, tmp_path / "s.jsonl", *given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "s.jsonl").exists()


def test_too_little_memory_is_one_line_with_the_cure(policy, data, tmp_path, capsys):
    """The address space of this process is limited to what it has and 150 MB, of which a batch needs more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 150_000_000, before[1]))
    try:
        code = generate(policy, data, tmp_path / "s.jsonl", "--samples", 20_000, "--max_prompts", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1 and error.startswith("error: out of memory: 20000 responses, ")
    assert "set batch_tokens to less" in error and not (tmp_path / "s.jsonl").exists()


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_probabilities_that_are_not_finite_are_no_samples(policy, data, tmp_path, capsys, top_p):
    """A logit over so low a temperature is infinite, as after a training that diverged."""
    given = ["--temperature", 1e-40, "--top_p", top_p, "--max_prompts", 2]
    assert generate(policy, data, tmp_path / "s.jsonl", *given) == 1
    assert "probabilities of tokens that are not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "s.jsonl").exists()


def test_a_preference_model_and_an_adapter_can_be_policies(saved, policy, data, tmp_path):
    assert generate(saved(), data, tmp_path / "preference.jsonl", "--max_prompts", 2) == 0
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(policy)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "merged")
    found = []
    for name in ("adapter", "merged"):
        assert generate(tmp_path / name, data, tmp_path / f"{name}.jsonl", "--max_prompts", 4) == 0
        found.append([row["response_ids"] for row in read_samples(tmp_path / f"{name}.jsonl")])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q"}, [{"role": "user", "content": "q"}]),
        ({"prompt": "q", "system": "s"}, [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]),
        ({"messages": MESSAGES, "prompt_id": "x"}, MESSAGES),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "a"}]}, MESSAGES),
        ({"prompt": "q", "responses": ["a", "b"], "preferences": [[0, 1]]}, [{"role": "user", "content": "q"}]),
        ({"prompt": "q", "chosen": None}, [{"role": "user", "content": "q"}]),
        ({"prompt": "q", "response": "a"}, "nothing reads the text of column 'response'"),
        ({"prompt": "q", "messages": MESSAGES}, "nothing reads the text of column 'messages'"),
        ({"prompt": "q", "chosen": "a"}, "no key 'rejected'"),
        ({"prompt": ""}, None),
        ({"text": "q"}, "nothing reads the text of column 'text'"),
        ("q", "expected a JSON object"),
    ],
)
def test_prompts_of_records(record, expected):
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            parse_prompt_record(record, Reading())
    elif expected is not None:
        assert parse_prompt_record(record, Reading()).prompt == expected


def test_prompts_without_ids_have_the_same_ones_wherever_their_files_are(policy, tmp_path):
    """Random numbers of samples depend on them."""
    found = []
    for place in (tmp_path / "here", tmp_path / "some" / "where"):
        (place / "set").mkdir(parents=True)
        for name in ("one", "two"):
            (place / "set" / f"{name}.jsonl").write_text(f'{{"prompt": "a {name}"}}\n\n{{"prompt": "b {name}"}}')
        given = {"set": place / "set", "glob": place / "*" / "*.jsonl", "file": place / "set" / "one.jsonl"}
        encoder = ComparisonTokenizer(load_tokenizer(policy))
        read = {name: read_prompts([Source(name, str(path))], encoder, Reading())[0] for name, path in given.items()}
        found.append({name: [prompt.id for prompt in some] for name, some in read.items()})
    assert found[0] == found[1]
    assert found[0]["file"] == ["one.jsonl, line 1", "one.jsonl, line 3"]
    assert (
        found[0]["set"]
        == found[0]["glob"]
        == [f"set/{name}.jsonl, line {n}" for name in ("one", "two") for n in (1, 3)]
    )


def test_a_policy_that_opens_with_thoughts_gets_the_opening_in_its_prompt(policy):
    tokenizer = load_tokenizer(policy)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|assistant|>'", "'<|assistant|><think>\\n'")
    encoder = ComparisonTokenizer(tokenizer)
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert encoder.encode_prompt(MESSAGES) == expected
    assert tokenizer.decode(expected).endswith("<|assistant|><think>\n")
    begun = [MESSAGES[1], {"role": "assistant", "content": "I say", "prefix": True}]
    assert tokenizer.decode(encoder.encode_prompt(begun)).endswith("<|assistant|>I say")


def test_scores_are_those_of_the_pipeline(made, scored, saved):
    samples, (rows, summary) = read_samples(made), read_scores(scored)
    rm = GPMPipeline(saved())
    expected = rm.embed([row["prompt"] for row in samples], [row["responses"] for row in samples])
    for row, sample, one in zip(rows, samples, expected, strict=True):
        assert row["id"] == sample["id"]
        torch.testing.assert_close(torch.tensor(row["embeddings"]), one.embeddings, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(row["gate"]), one.gate, atol=1e-5, rtol=0)
    settings = summary["settings"]
    assert settings["samples"] == samples_checksum(samples) and settings["tau"] == pytest.approx(0.1)
    assert (settings["head"], settings["dim"], settings["planes"], summary["cut"]) == ("gpm", 4, 2, 0)
    assert summary["mean_gate"] == pytest.approx(torch.stack([one.gate for one in expected]).mean(0).tolist(), abs=1e-5)
    assert len(summary["mean_plane_score"]) == 2 and 0 <= summary["cyclic_share"] <= 1


def test_scoring_continues_skips_and_refuses(made, scored, saved, tmp_path, capsys):
    base = ["--samples", str(made), "--output", str(scored)]
    content = scored.read_bytes()
    assert score_responses.main(["--model", saved(), *base]) == 0 and scored.read_bytes() == content
    assert score_responses.main(["--model", saved(), *base, "--max_length", "16"]) == 2
    assert "max_length = None, now 16" in capsys.readouterr().err
    cut = ["--model", saved(), "--samples", str(made), "--output", str(tmp_path / "cut.jsonl"), "--max_length", "64"]
    assert score_responses.main(cut) == 0
    encoder, rows = GPMPipeline(saved(), max_length=64).encoder, read_samples(made)
    prompts = [row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
               for row in rows]  # fmt: skip
    answers = [[[{"role": "assistant", "content": text}] for text in row["responses"]] for row in rows]
    found = [(row["prompt_cut"], row["response_cut"]) for row in encoder.encode(prompts, answers)]
    kept = [row.get("cut", False) for row in read_scores(tmp_path / "cut.jsonl")[0]]
    assert kept == [any(one) for one in found] and True in kept
    assert read_scores(tmp_path / "cut.jsonl")[1]["cut"] == sum(kept)
    for given, message in (
        (["--model", "/nowhere/rm", *base], "/nowhere/rm does not exist"),
        (["--model", saved(), "--samples", "/nowhere/s.jsonl"], "/nowhere/s.jsonl does not exist"),
        (["--model", saved(), "--samples", str(made), "--output", str(made)], "which is read"),
    ):
        assert score_responses.main(given) == 2
        assert message in capsys.readouterr().err


def test_a_cut_prompt_and_a_cut_response_are_both_told():
    embedded = EmbeddedPrompt(torch.tensor([[1.0, 2.0]]), None, torch.tensor([1.0]))
    row = {"id": "x", "embeddings": [[1.0, 2.0]], "gate": [1.0]}
    for cuts, expected in (
        ((False, False), row),
        ((True, False), row | {"cut": True}),
        ((False, True), row | {"cut": True}),
    ):
        encoded = {"id": "x", **dict(zip(("prompt_cut", "response_cut"), cuts, strict=True))}
        assert score_row(encoded, embedded) == expected


def test_summaries_of_scores_agree_with_a_count_by_hand():
    """Two responses at right angles in a plane with gate 3, and a scalar 5 apart; and three in a cycle without gate."""
    turn = [[math.cos(angle), math.sin(angle), 1.0] for angle in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    rows = [
        {"id": "a", "embeddings": [[1.0, 0.0, 7.0], [0.0, 1.0, 2.0]], "gate": [3.0]},
        {"id": "b", "embeddings": turn, "gate": None, "cut": True},
    ]
    found = summarize_scores(rows)
    assert (found["prompts"], found["cut"], found["mean_gate"]) == (2, 1, [3.0])
    assert found["mean_plane_score"] == pytest.approx([(3 + math.sin(2 * math.pi / 3)) / 2])
    assert found["mean_scalar_score"] == pytest.approx(5 / 2) and found["cyclic_share"] == pytest.approx(1.0)


def test_only_scores_of_these_samples_are_joined(made, scored):
    samples, scores = read_samples(made), read_scores(scored)
    joined = join(samples, scores)
    assert [row["id"] for row in joined] == [row["id"] for row in samples]
    assert joined[3]["embeddings"] == scores[0][3]["embeddings"] and joined[3]["prompt_ids"] == samples[3]["prompt_ids"]
    other = [samples[0] | {"responses": ["x", *samples[0]["responses"][1:]]}, *samples[1:]]
    longer = [samples[0] | {"response_ids": [[7], *samples[0]["response_ids"][1:]]}, *samples[1:]]
    for some in (other, longer):
        with pytest.raises(InputError, match="of other samples"):
            join(some, scores)
    with pytest.raises(InputError, match="17 scored prompts, but 16"):
        join(samples[1:], scores)
    with pytest.raises(InputError, match="no row with the id 'new'"):
        join([samples[0] | {"id": "new"}, *samples[1:]], scores)
    with pytest.raises(InputError, match="17 scored prompts have 16 ids"):
        join(samples, ([scores[0][1], *scores[0][1:]], scores[1]))
    with pytest.raises(InputError, match="3 responses, but 2 were scored"):
        join(samples, ([scores[0][0] | {"embeddings": scores[0][0]["embeddings"][:2]}, *scores[0][1:]], scores[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": ["a"]}, "disagree about the number of responses"),
        ({"responses": [], "response_ids": [], "finished": []}, "has no response"),
        ({"note": "x"}, "expected samples with id, prompt"),
        ({"finished": None}, "not a list"),
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"prompt_ids": [1, -3]}, "found the token -3, expected whole numbers from 0"),
        ({"response_ids": [[7], [8, 2.5], [9]]}, "found the token 2.5, expected"),
        ({"response_ids": [[7], [8], [2**40]]}, "found the token 1099511627776, expected"),
        ({"response_ids": [[7], 8, [9]]}, "response_ids is no list of list"),
        ({"responses": ["a", None, "b"]}, "responses is no list of str"),
        ({"id": 3}, "its id is 3, expected text"),
    ],
)
def test_files_that_are_no_samples_are_refused_by_line(made, tmp_path, change, message):
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    rows[2] |= change
    file = tmp_path / "s.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"no s\.summary\.json beside it"):
        read_samples(file)
    (tmp_path / "s.summary.json").write_text(made.with_name("samples.summary.json").read_text())
    with pytest.raises(InputError, match=f"line 3: .*{message}"):
        read_samples(file)
    with pytest.raises(InputError, match="expected scores with id"):
        read_scores(file)


FAKE = """
import json, os
class SamplingParams:
    def __init__(self, **given): self.given = given
class One:
    def __init__(self, index, ids): self.index, self.token_ids = index, ids
class Found:
    def __init__(self, outputs): self.outputs = outputs
class LLM:
    def __init__(self, **given): self.log = [given, {k: os.environ.get(k) for k in ("RANK", "CUDA_VISIBLE_DEVICES")}]
    def generate(self, prompts, settings, use_tqdm):
        self.log.append([[p["prompt_token_ids"], s.given] for p, s in zip(prompts, settings, strict=True)])
        open(os.environ["FAKE_LOG"], "w").write(json.dumps(self.log))
        if os.environ.get("FAKE_FAILS") and len(self.log) > 2: raise RuntimeError("no memory")
        answers = [[len(p["prompt_token_ids"]), n + 10] + ([5] if n else [9, 9]) for p in prompts for n in range(3)]
        return [Found([One(n, tuple(answers[3 * i + n])) for n in (2, 0, 1)]) for i in range(len(prompts))]
"""


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> Path:
    """A module called vllm that answers at once; returns the file of what it was asked."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "vllm.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log.json"))
    monkeypatch.setenv("GENERATE_PYTHON", sys.executable)
    return tmp_path / "log.json"


def test_vllm_is_asked_for_what_was_asked_for(vllm, policy, data, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(generate_responses.generation, "CHUNK", 5)
    output = tmp_path / "s.jsonl"
    given = ["--temperature", "0.7", "--top_p", "0.9", "--vllm_options", '{"max_model_len": 512, "dtype": "float16"}']
    assert generate(policy, data, output, *given) == 0
    engine, environment, *chunks = json.loads(vllm.read_text())
    assert [len(chunk) for chunk in chunks] == [5, 5, 5, 2]
    asked = [one for chunk in chunks for one in chunk]
    assert engine["model"] == policy and engine["generation_config"] == "vllm" and engine["max_model_len"] == 512
    assert environment["RANK"] is None
    rows = read_samples(output)
    by_prompt = {tuple(ids): given for ids, given in asked}
    assert len(asked) == len(by_prompt) == len(rows) == 17
    assert [len(ids) for ids, _ in asked] == sorted((len(row["prompt_ids"]) for row in rows), reverse=True)
    seeds = {given.pop("seed") for given in by_prompt.values()}
    assert len(seeds) == 17
    for row in rows:
        assert by_prompt[tuple(row["prompt_ids"])] == {
            "n": 3, "temperature": 0.7, "top_p": 0.9, "max_tokens": 12, "stop_token_ids": [5, 9], "detokenize": False,
        }  # fmt: skip
        length = len(row["prompt_ids"])
        assert row["response_ids"] == [[length, 10, 9], [length, 11, 5], [length, 12, 5]]
        assert row["finished"] == [True, True, True]
    settings = json.loads(output.with_name("s.summary.json").read_text())["settings"]
    assert settings["engine"] == "vllm" and settings["dtype"] == engine["dtype"] == "float16"


def test_what_vllm_cannot_do_is_one_line(vllm, policy, data, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_FAILS", "1")
    assert generate(policy, data, tmp_path / "s.jsonl") == 1
    assert "process of vLLM ended with exit code 1" in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "s.jsonl").exists()
    monkeypatch.setenv("GENERATE_PYTHON", "/nowhere/python")
    assert generate(policy, data, tmp_path / "s.jsonl") == 2
    assert "/nowhere/python" in capfd.readouterr().err
    (vllm.parent / "fake" / "vllm.py").unlink()
    monkeypatch.setenv("GENERATE_PYTHON", sys.executable)
    assert generate(policy, data, tmp_path / "s.jsonl") == 1
    assert "has no vLLM" in capfd.readouterr().err


def test_continuous_batching_samples_from_the_policy_too(policy, data, tmp_path):
    pytest.importorskip("psutil")
    assert generate(policy, data, tmp_path / "s.jsonl", "--engine", "continuous", "--max_prompts", 3) == 0
    rows = read_samples(tmp_path / "s.jsonl")
    assert len(rows) == 3 and len({tuple(ids) for row in rows for ids in row["response_ids"]}) > 5
    for row in rows:
        for ids, end in zip(row["response_ids"], row["finished"], strict=True):
            assert 1 <= len(ids) <= 12 and end == (ids[-1] in (5, 9)) and not {5, 9} & set(ids[:-1])
