"""Group rewards inside OpenRLHF and verl: samples that are asked for one by one meet, or all of them fail.

Each test runs with a stand-in for the framework's base classes, and with the installed framework where there is one;
the last tests compare their signatures.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import sys
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import general_preference.serving
from general_preference.errors import InputError, RunError
from general_preference.inference.pipeline import GPMPipeline
from general_preference.serving.environment import group_scorer
from general_preference.serving.group_reward import AsyncGroupReward
from general_preference.serving.rendezvous import Rendezvous

FOLDER = general_preference.serving.__path__[0]
PROMPT = [{"role": "system", "content": "Choose."}, {"role": "user", "content": "Which throw wins?"}]
WORDS = ["rock", "paper", "scissors", "", "Name one.", "the rock, the paper", "wins", "äöü 你好"]


class SingleTurnAgentExecutor:
    """As OpenRLHF's `SingleTurnAgentExecutor` without reward functions: one sample of one prompt."""

    def __init__(self, remote_rm_url=None):
        assert remote_rm_url is None

    async def execute(self, prompt, label, sampling_params, max_length: int, hf_tokenizer, llm_engine, images=None):
        asked = hf_tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        answer = (await llm_engine.generate(asked, sampling_params, multi_modal_data=None)).outputs[0].token_ids
        span = (len(asked), len(asked) + len(answer))
        return {"prompt": prompt, "observation_tokens": asked + answer, "action_ranges": [span], "reward": None}


class RewardManagerBase:
    """As verl's."""

    def __init__(self, config, tokenizer, compute_score):
        self.config, self.tokenizer, self.compute_score = config, tokenizer, compute_score

    async def run_single(self, data):
        raise NotImplementedError


class Rows:
    """As verl's `DataProto`, of which a reward manager reads rows."""

    def __init__(self, batch, non_tensor_batch):
        self.batch, self.non_tensor_batch = batch, non_tensor_batch

    def __getitem__(self, item):
        return Rows(*({name: values[item] for name, values in kind.items()} for kind in vars(self).values()))


STAND_INS = {
    "openrlhf.utils.agent": {"SingleTurnAgentExecutor": SingleTurnAgentExecutor},
    "verl": {"DataProto": Rows},
    "verl.experimental.reward_loop.reward_manager.base": {"RewardManagerBase": RewardManagerBase},
}


@pytest.fixture(params=["stand-in"] + ["installed"] * any(map(importlib.util.find_spec, ("openrlhf", "verl"))))
def framework(request, monkeypatch):
    """A function: name -> the adapter's module, above a framework that stands in or is installed."""
    monkeypatch.setenv("GPM_OPTIONS", '{"device": "cpu"}')

    def load(name: str) -> ModuleType:
        for place, names in STAND_INS.items():
            if place.split(".")[0] == name and request.param == "stand-in":
                for parent in (place[:end] for end, sign in enumerate(place) if sign == "."):
                    monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, ModuleType(parent)))
                monkeypatch.setitem(sys.modules, place, module := ModuleType(place))
                vars(module).update(names)
            elif place.split(".")[0] == name:
                pytest.importorskip(place, exc_type=ImportError)
        spec = importlib.util.spec_from_file_location("agent_module", f"{FOLDER}/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)  # as the frameworks load a file that is named
        return module

    return load


@pytest.fixture
def model(saved, monkeypatch) -> str:
    """A tiny model, which the environment names."""
    monkeypatch.setenv("GPM_MODEL", folder := saved())
    return folder


def win_rates(folder: str, texts: list[str], prompt=PROMPT) -> list[float]:
    matrix = GPMPipeline(folder, device="cpu").preference_matrix(prompt, texts)
    return ((matrix.sum(dim=1) - 0.5) / (len(texts) - 1)).tolist()


class Engine:
    """Generates after a while, in another order; an exception in the place of a text is raised, None never comes."""

    def __init__(self, tokenizer, texts: list):
        self.tokenizer, self.texts, self.made = tokenizer, list(texts), []

    async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
        text = self.texts.pop(0)
        await asyncio.sleep(0.001 * (len(str(text)) % 7))
        if isinstance(text, Exception):
            raise text
        if text is None:
            await asyncio.Event().wait()
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        answer = SimpleNamespace(token_ids=ids, text=text, finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[answer])


async def generate_responses(executor, tokenizer, texts, label=None, **changed):
    """All samples of a prompt, as OpenRLHF asks for them: one object of sampling parameters for each call."""
    label = json.dumps({"messages": PROMPT}) if label is None else label
    prompt = tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    arguments = {
        "prompt": prompt, "label": label, "max_length": 400, "hf_tokenizer": tokenizer,
        "llm_engine": Engine(tokenizer, texts), "sampling_params": SimpleNamespace(max_tokens=50, logprobs=None),
    } | changed  # fmt: skip
    return await asyncio.gather(*(executor.execute(**arguments) for _ in texts), return_exceptions=True)


def rewards(outputs) -> list[float]:
    return [output["reward"] for output in outputs]


def nothing_is_kept(adapter) -> bool:
    return not adapter._rendezvous._groups and not getattr(adapter, "_siblings", None)


class TestOpenRLHF:
    @pytest.fixture
    def executor(self, framework, model):
        return framework("openrlhf").AgentExecutor()

    def test_groups_of_equal_prompts_do_not_mix(self, executor, tokenizer, model):
        groups = [[f"{word}{'!' * (n % 5)}" for word in np.roll(WORDS, n)] for n in range(20)]

        async def run():
            return await asyncio.gather(*(generate_responses(executor, tokenizer, texts) for texts in groups))

        for texts, outputs in zip(groups, asyncio.run(run()), strict=True):
            assert rewards(outputs) == pytest.approx(win_rates(model, texts), abs=1e-5)
            assert [output["scores"] for output in outputs] == rewards(outputs)
        assert nothing_is_kept(executor)

    def test_evaluation_may_have_groups_of_another_size(self, executor, tokenizer, model):
        async def run():
            sizes = 8, 4, 2
            return await asyncio.gather(*(generate_responses(executor, tokenizer, WORDS[:n]) for n in sizes))

        for outputs in asyncio.run(run()):
            assert rewards(outputs) == pytest.approx(win_rates(model, WORDS[: len(outputs)]), abs=1e-5)

    @pytest.mark.parametrize("place", [0, 3, 7])
    def test_a_sample_that_fails_fails_its_group_alone(self, executor, tokenizer, model, place):
        texts = [*WORDS[:place], ValueError("engine died"), *WORDS[place + 1 :]]

        async def run():
            return await asyncio.gather(*(generate_responses(executor, tokenizer, some) for some in (texts, WORDS)))

        failed, well = asyncio.run(run())
        assert rewards(well) == pytest.approx(win_rates(model, WORDS), abs=1e-5)
        assert type(failed.pop(place)) is ValueError
        said = rf"no sample of group .* gets a reward: sample {place + 1} of 8 failed \(ValueError: engine died\)"
        for error in failed:
            with pytest.raises(RunError, match=said):
                raise error
        assert nothing_is_kept(executor)

    def test_nobody_waits_for_ever(self, framework, tokenizer, model, monkeypatch):
        monkeypatch.setenv("GPM_DEADLINE", "0.2")
        executor = framework("openrlhf").AgentExecutor()

        async def run():
            group = asyncio.ensure_future(generate_responses(executor, tokenizer, [*WORDS[:7], None]))
            await asyncio.sleep(0.5)
            for task in asyncio.all_tasks() - {asyncio.current_task(), group}:
                task.cancel()  # the eighth
            return await group

        *waited, lost = asyncio.run(run())
        assert isinstance(lost, asyncio.CancelledError)
        for error in waited:
            with pytest.raises(RunError, match=r"7 of 8 samples came within 0\.2 seconds"):
                raise error
        assert nothing_is_kept(executor)

    def test_a_reference_needs_no_group(self, framework, tokenizer, model, monkeypatch):
        monkeypatch.setenv("GPM_MODE", "reference")
        executor, label = framework("openrlhf").AgentExecutor(), {"messages": PROMPT, "reference": "paper"}
        for texts in (["rock"], ["rock", ValueError("engine died"), "wins"]):
            outputs = asyncio.run(generate_responses(executor, tokenizer, texts, label))
            for text, output in zip(texts, outputs, strict=True):
                if isinstance(text, str):
                    expected = GPMPipeline(model, device="cpu").compare(PROMPT, text, "paper")
                    assert output["reward"] == pytest.approx(expected, abs=1e-5)
                else:
                    assert isinstance(output, ValueError)
        (missing,) = asyncio.run(generate_responses(executor, tokenizer, ["rock"]))
        assert "no 'reference'" in str(missing)
        assert nothing_is_kept(executor)

    @pytest.mark.parametrize(
        ("texts", "changed", "said"),
        [
            (WORDS[:1], {}, "one sample and nothing to be compared with: rollout.n_samples_per_prompt"),
            (WORDS[:2], {"label": "42"}, "the label '42' has no messages: .* column that data.label_key names"),
            (WORDS[:2], {"label": "the answer"}, "has no messages"),
            (WORDS[:2], {"label": {"messages": []}}, "has no messages"),
            (WORDS[:2], {"images": ["a.png"]}, "images, which the preference model would not see"),
        ],
    )
    def test_what_cannot_be_scored_is_refused(self, executor, tokenizer, texts, changed, said):
        for error in asyncio.run(generate_responses(executor, tokenizer, texts, **changed)):
            with pytest.raises(InputError, match=said):
                raise error
        assert nothing_is_kept(executor)

    def test_a_file_may_choose_the_reward(self, framework, saved, tokenizer, monkeypatch):
        monkeypatch.delenv("GPM_MODEL", raising=False)
        module = framework("openrlhf")
        with pytest.raises(InputError, match="one of GPM_MODEL and GPM_URL"):
            module.AgentExecutor()
        pipeline = GPMPipeline(saved("llama", "bt", 1, False), device="cpu")
        executor = module.AgentExecutor(AsyncGroupReward(pipeline, "score"))
        outputs = asyncio.run(generate_responses(executor, tokenizer, WORDS[:3]))
        (embedded,) = pipeline.embed([PROMPT], [WORDS[:3]])
        expected = embedded.scores().sum(dim=1) / 2
        assert rewards(outputs) == pytest.approx(expected.tolist(), abs=1e-4)


def verl_config(n=8, validation_n=8, workers=1, test_freq=10, path=None, enable=False):
    rollout = SimpleNamespace(n=n, val_kwargs=SimpleNamespace(n=validation_n))
    manager = {"custom_reward_function": SimpleNamespace(path=path), "reward_model": SimpleNamespace(enable=enable)}
    return SimpleNamespace(
        actor_rollout_ref=SimpleNamespace(rollout=rollout),
        reward=SimpleNamespace(num_workers=workers, **manager),
        trainer=SimpleNamespace(test_freq=test_freq, val_before_train=False),
    )


def sample(tokenizer, uid: str, index: int, text: str, **fields):
    """What verl's agent loop sends for one sample (`AgentLoopWorker._compute_score`): batches of one."""
    ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
    padded = torch.nn.functional.pad(ids, (0, 3), value=60)  # of a longer sequence beside it
    fields = {
        "uid": uid, "session_id": index, "raw_prompt": PROMPT, "extra_info": {"split": "train"},
        "reward_model": {"ground_truth": "paper"}, "__num_turns__": 2, "response_len": ids.shape[1],
    } | fields  # fmt: skip
    batch = {"responses": padded, "prompts": torch.zeros(1, 4, dtype=torch.long)}
    arrays = {name: np.array([value]) for name, value in fields.items() if value is not None}
    kind = sys.modules["verl"].DataProto
    return kind(batch if kind is Rows else sys.modules["tensordict"].TensorDict(batch, batch_size=1), arrays)


class TestVerl:
    @pytest.fixture
    def manager(self, framework, model, tokenizer):
        """A function: settings of `verl_config` -> manager."""

        def make(**changed):
            return framework("verl").GPMRewardManager(verl_config(**changed), tokenizer, None, None, None)

        return make

    @staticmethod
    def ask(managers: list, samples: list) -> list:
        """Rewards or errors of samples that go to one manager after the other."""

        async def run():
            asked = (managers[n % len(managers)].run_single(one) for n, one in enumerate(samples))
            return await asyncio.gather(*asked, return_exceptions=True)

        return [one if isinstance(one, Exception) else one["reward_score"] for one in asyncio.run(run())]

    def test_groups_of_equal_prompts_do_not_mix(self, manager, tokenizer, model):
        adapter = manager()
        texts = {f"u{n}": [f"{word}{'!' * (n % 5)}" for word in np.roll(WORDS, n)] for n in range(20)}
        order = [(uid, index) for index in range(8) for uid in texts]
        found = self.ask([adapter], [sample(tokenizer, uid, index, texts[uid][index]) for uid, index in order])
        for uid, some in texts.items():
            own = [reward for (group, _), reward in zip(order, found, strict=True) if group == uid]
            assert own == pytest.approx(win_rates(model, some), abs=1e-5)
        assert nothing_is_kept(adapter)

    def test_validation_may_have_groups_of_another_size(self, manager, tokenizer, model):
        adapter = manager(validation_n=3)
        splits = {"a": ("train", 8), "b": ("test", 3), "c": ("validation", 3)}
        for uid, (split, size) in splits.items():
            samples = [
                sample(tokenizer, uid, index, WORDS[index], extra_info={"split": split}) for index in range(size)
            ]
            assert self.ask([adapter], samples) == pytest.approx(win_rates(model, WORDS[:size]), abs=1e-5)
        for info in ({"index": 3}, None, {"split": "dev"}):
            (error,) = self.ask([adapter], [sample(tokenizer, "d", 0, "rock", extra_info=info)])
            assert isinstance(error, InputError)
            assert "rollout.n is 8 and rollout.val_kwargs.n 3, and this sample's split is" in str(error)

    def test_a_sample_that_fails_fails_its_group_alone(self, manager, tokenizer, model):
        adapter = manager()
        bad = [sample(tokenizer, "a", n, WORDS[n], __num_turns__=5 if n == 3 else 2) for n in range(8)]
        good = [sample(tokenizer, "b", n, WORDS[n]) for n in range(8)]
        found = self.ask([adapter], [one for pair in zip(bad, good, strict=True) for one in pair])
        assert found[1::2] == pytest.approx(win_rates(model, WORDS), abs=1e-5)
        failed = found[::2]
        assert "a sample has 5 turns" in str(failed.pop(3))
        for error in failed:
            with pytest.raises(RunError, match=r"group a gets a reward: sample 3 \(from 0\) of 8 failed \(InputError"):
                raise error
        assert nothing_is_kept(adapter)

    def test_nobody_waits_for_ever(self, manager, tokenizer, monkeypatch):
        monkeypatch.setenv("GPM_DEADLINE", "0.2")
        for error in self.ask([manager()], [sample(tokenizer, "a", n, WORDS[n]) for n in range(7)]):
            with pytest.raises(RunError, match=r"group a gets a reward: 7 of 8 samples came within 0\.2 seconds"):
                raise error

    def test_a_group_larger_than_the_config_says_is_refused(self, manager, tokenizer, model):
        found = self.ask([manager(n=2, validation_n=2)], [sample(tokenizer, "a", n, WORDS[n]) for n in range(3)])
        assert found[:2] == pytest.approx(win_rates(model, WORDS[:2]), abs=1e-5)
        assert "sample 2, from 0, of a group of 2: does the data set have __rollout_n__" in str(found[2])

    def test_a_reference_needs_no_group(self, manager, tokenizer, model, monkeypatch):
        monkeypatch.setenv("GPM_MODE", "reference")
        found = self.ask([manager(workers=8, validation_n=1)], [sample(tokenizer, "a", 5, "rock")])
        assert found == pytest.approx([GPMPipeline(model, device="cpu").compare(PROMPT, "rock", "paper")], abs=1e-5)

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"workers": 8}, "reward.num_workers is 8, which splits groups: set it to 1, or GPM_URL"),
            ({"n": 1}, "rollout.n is 1, which leaves a sample nothing to be compared with: raise it"),
            ({"validation_n": 1}, "rollout.val_kwargs.n is 1, .* or turn validation off"),
            ({"path": "f.py"}, "custom_reward_function.path is 'f.py', which this manager does not call"),
            ({"enable": True}, "with reward.reward_model.enable verl asks no reward manager"),
        ],
    )
    def test_a_config_that_cannot_work_is_refused_at_the_start(self, manager, changed, said):
        with pytest.raises(InputError, match=said):
            manager(**changed)
        manager(validation_n=1, test_freq=-1)  # without validation its size does not matter

    def test_the_old_trainer_is_refused(self, manager, tokenizer):
        (error,) = self.ask([manager()], [sample(tokenizer, "a", None, "rock")])
        assert "no session_id, its number in the group: set trainer.use_v1" in str(error)

    def test_workers_meet_at_a_server(self, manager, tokenizer, model, preference_server, monkeypatch):
        monkeypatch.delenv("GPM_MODEL")
        monkeypatch.delenv("GPM_OPTIONS")
        monkeypatch.setenv("GPM_URL", preference_server.url + "/")
        monkeypatch.setenv("GPM_API_KEY", "secret")
        monkeypatch.setenv("GPM_DEADLINE", "15")
        managers = [manager(workers=8)] * 4 + [manager(workers=8)]  # the first has 128 samples that wait
        samples = [sample(tokenizer, f"u{n % 20}", n // 20, f"{WORDS[n // 20]} {n}") for n in range(160)]
        *found, error = self.ask(managers, [*samples, sample(tokenizer, "broken", 0, "rock")])
        for group in range(20):
            texts = [f"{WORDS[n // 20]} {n}" for n in range(group, 160, 20)]
            assert found[group::20] == pytest.approx(win_rates(model, texts), abs=1e-5)
        assert preference_server.keys == {"Bearer secret"}
        assert "/reward answered with status 500 and no reward: out of memory" in str(error)

    def test_a_server_that_is_not_there_is_named(self, manager, tokenizer, monkeypatch):
        monkeypatch.delenv("GPM_MODEL")
        monkeypatch.delenv("GPM_OPTIONS")
        monkeypatch.setenv("GPM_URL", "http://127.0.0.1:9")
        (error,) = self.ask([manager()], [sample(tokenizer, "a", 0, "rock")])
        assert "nothing answers at http://127.0.0.1:9/reward" in str(error)
        monkeypatch.setenv("GPM_MODE", "nash")
        with pytest.raises(InputError, match="GPM_MODE is set, but the preference server has a mode of its own"):
            manager()


@pytest.fixture
def preference_server(saved):
    """A server that answers POST /reward when a group is whole; the samples of u3 are refused at first."""
    pipeline, whole, groups = GPMPipeline(saved(), device="cpu"), threading.Condition(), defaultdict(dict)
    keys, seen = set(), set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            group, status = body["label"]["group"], 200
            refused = (group["id"], group["index"]) not in seen
            seen.add((group["id"], group["index"]))
            keys.add(self.headers["Authorization"])
            if self.path != "/reward" or group["id"] == "broken":
                status, answer = 500, b"out of memory"
            elif group["id"] == "u3" and refused:
                status, answer = (429, 503)[group["index"] % 2], b"ask again"
            else:
                with whole:
                    mine = groups[group["id"]]
                    mine[group["index"]] = body["label"]["response"]
                    if len(mine) == group["size"]:
                        texts = [mine[n] for n in range(group["size"])]
                        mine["rewards"] = win_rates_of(pipeline, body["prompt"], texts)
                        whole.notify_all()
                    whole.wait_for(lambda: "rewards" in mine, timeout=30)
                answer = json.dumps({"reward": mine["rewards"][group["index"]]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 256

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", keys=keys)
    server.shutdown()
    server.server_close()


def win_rates_of(pipeline: GPMPipeline, prompt: list, texts: list[str]) -> list[float]:
    matrix = pipeline.preference_matrix(prompt, texts)
    return ((matrix.sum(dim=1) - 0.5) / (len(texts) - 1)).tolist()


class TestRendezvous:
    @staticmethod
    async def double(members: list) -> list[float]:
        await asyncio.sleep(0.01)
        return [2.0 * one for one in members]

    def test_each_gets_its_own(self):
        async def run():
            meeting = Rendezvous(self.double, 10)
            asked = [meeting.meet(key, size, n) for n in range(5) for key, size in (("a", 5), ("b", 1), ("c", 5))]
            found = await asyncio.gather(*asked)
            again = await asyncio.gather(*(meeting.meet("a", 2, n) for n in (7, 8)))
            return found, again, meeting._groups

        assert asyncio.run(run()) == ([2.0 * n for n in range(5) for _ in range(3)], [14.0, 16.0], {})

    @pytest.mark.parametrize(("canceled", "came"), [(0, 3), (2, 3), (0, 2)])
    def test_one_that_is_canceled_after_it_came_harms_nobody(self, canceled, came):
        async def run():
            meeting = Rendezvous(self.double, 10)
            tasks = [asyncio.ensure_future(meeting.meet("a", 3, n)) for n in range(came)]
            await asyncio.sleep(0.005)
            tasks[canceled].cancel()
            await asyncio.sleep(0)
            tasks += [asyncio.ensure_future(meeting.meet("a", 3, n)) for n in range(came, 3)]
            return await asyncio.gather(*tasks, return_exceptions=True)

        found = asyncio.run(run())
        assert isinstance(found.pop(canceled), asyncio.CancelledError)
        assert found == [2.0 * n for n in range(3) if n != canceled]

    def test_who_comes_after_a_failure_is_told_at_once(self):
        async def run():
            meeting = Rendezvous(self.double, 10)
            meeting.fail("a", 3, "it died")
            late = await asyncio.gather(*(meeting.meet("a", 3, n) for n in range(2)), return_exceptions=True)
            return late, meeting._groups

        late, kept = asyncio.run(run())
        assert [str(error) for error in late] == ["no sample of group a gets a reward: it died"] * 2
        assert not kept

    def test_what_the_score_raises_all_raise(self):
        async def refuse(members):
            raise InputError("too long")

        async def run():
            meeting = Rendezvous(refuse, 10)
            return await asyncio.gather(*(meeting.meet("a", 3, n) for n in range(3)), return_exceptions=True)

        assert [(type(error), str(error)) for error in asyncio.run(run())] == [(InputError, "too long")] * 3

    def test_the_deadline_is_for_coming_not_for_scoring(self):
        async def slow(members):
            await asyncio.sleep(0.3)
            return members

        async def run():
            meeting = Rendezvous(slow, 0.1)
            return await asyncio.gather(*(meeting.meet("a", 2, n) for n in range(2)))

        assert asyncio.run(run()) == [0, 1]

    def test_a_group_that_is_whole_in_time_is_scored(self):
        """Its last member comes just before the deadline, while the event loop is busy."""

        async def run():
            meeting = Rendezvous(self.double, 0.1)
            first = asyncio.ensure_future(meeting.meet("a", 2, 0))
            await asyncio.sleep(0.05)
            last = asyncio.ensure_future(meeting.meet("a", 2, 1))
            await asyncio.sleep(0)
            time.sleep(0.1)
            return await asyncio.gather(first, last)

        assert asyncio.run(run()) == [0.0, 2.0]


def test_a_model_is_loaded_once_by_groups_that_come_together(saved, monkeypatch):
    loaded = []

    class Loading(GPMPipeline):
        def __init__(self, *args, **options):
            loaded.append(args)
            super().__init__(*args, **options)

    monkeypatch.setattr("general_preference.serving.group_reward.GPMPipeline", Loading)

    async def run():
        score = group_scorer(AsyncGroupReward(saved(), device="cpu"))
        return await asyncio.gather(*(score([(PROMPT, word, None) for word in WORDS[:3]]) for _ in range(8)))

    assert asyncio.run(run()) == [pytest.approx(win_rates(saved(), WORDS[:3]), abs=1e-5)] * 8
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "one of GPM_MODEL and GPM_URL"),
        ({"GPM_MODEL": "m", "GPM_URL": "http://h"}, "one of GPM_MODEL and GPM_URL"),
        ({"GPM_MODEL": "m", "GPM_MODE": "best"}, "unknown mode 'best'"),
        ({"GPM_MODEL": "m", "GPM_OPTIONS": "device=cpu"}, "GPM_OPTIONS are no JSON object"),
        ({"GPM_MODEL": "m", "GPM_OPTIONS": "[1]"}, "GPM_OPTIONS are no JSON object"),
        ({"GPM_MODEL": "m", "GPM_DEADLINE": "an hour"}, "GPM_DEADLINE is 'an hour', expected a number"),
        ({"GPM_MODEL": "m", "GPM_DEADLINE": "0"}, "GPM_DEADLINE is '0', expected a number"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(framework, monkeypatch, variables, said):
    monkeypatch.delenv("GPM_OPTIONS")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        framework("openrlhf").AgentExecutor()


# What follows needs the frameworks themselves.


def installed(place: str) -> ModuleType:
    return pytest.importorskip(place, exc_type=ImportError)


def shape(function) -> list[tuple]:
    """Names, kinds and defaults of the parameters."""
    return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(
    ("place", "stand_in", "methods"),
    [
        ("openrlhf.utils.agent", SingleTurnAgentExecutor, ("__init__", "execute")),
        ("verl.experimental.reward_loop.reward_manager.base", RewardManagerBase, ("__init__", "run_single")),
    ],
)
def test_stand_ins_have_the_signatures_of_the_installed_framework(place, stand_in, methods):
    real = getattr(installed(place), stand_in.__name__)
    for method in methods:
        assert shape(getattr(stand_in, method)) == shape(getattr(real, method)), method


def test_openrlhf_asks_one_executor_for_all_samples_of_a_prompt(model, tokenizer, monkeypatch):
    """What the adapter relies on, with OpenRLHF's own code but for vLLM's."""
    engine = installed("openrlhf.trainer.ray.vllm_engine")
    monkeypatch.setenv("GPM_OPTIONS", '{"device": "cpu"}')
    executor = engine._load_agent_executor(f"{FOLDER}/openrlhf.py")
    actor_class = engine.RolloutRayActor
    if hasattr(actor_class, "__ray_metadata__"):
        actor_class = actor_class.__ray_metadata__.modified_class
    label, groups = json.dumps({"messages": PROMPT}), [WORDS, WORDS[::-1], WORDS[:4]]

    async def run():
        calls = []
        for texts in groups:  # Ray hands each call its own copy of the arguments
            actor = Engine(tokenizer, texts)
            actor.executor = executor
            parameters = SimpleNamespace(max_tokens=50, logprobs=None)
            arguments = ("the same prompt", label, parameters, 400, tokenizer, len(texts))
            calls.append(actor_class.generate_responses(actor, *arguments))
        return await asyncio.gather(*calls)

    for texts, outputs in zip(groups, asyncio.run(run()), strict=True):
        assert rewards(outputs) == pytest.approx(win_rates(model, texts), abs=1e-5)


def test_verl_loads_the_manager_and_gives_it_what_it_reads(model, tokenizer, monkeypatch):
    """With verl's own configuration and its own code up to the reward worker."""
    loop, reward = installed("verl.experimental.agent_loop.agent_loop"), installed("verl.trainer.ppo.reward")
    config = installed("omegaconf").OmegaConf.load(
        Path(reward.__file__).parents[1] / "config/_generated_ppo_trainer.yaml"
    )
    config.merge_with_dotlist(
        [
            "reward.num_workers=1",
            "reward.reward_manager.source=importlib",
            "reward.reward_manager.name=GPMRewardManager",
            "reward.reward_manager.module.path=pkg://general_preference.serving.verl",
            "actor_rollout_ref.rollout.n=8",
            "actor_rollout_ref.rollout.val_kwargs.n=4",
        ]
    )
    monkeypatch.setenv("GPM_OPTIONS", '{"device": "cpu"}')
    monkeypatch.delitem(sys.modules, "general_preference.serving.verl", raising=False)
    manager = reward.load_reward_manager(config, tokenizer, reward_router_address=None, reward_model_tokenizer=None)
    handle = SimpleNamespace(compute_score=SimpleNamespace(remote=manager.run_single))
    worker = SimpleNamespace(
        reward_loop_worker_handles=[handle],
        _compute_multi_modal_inputs=lambda output, ids: {},
        _compute_position_ids=lambda ids, *_: torch.arange(ids.shape[1])[None],
        _get_mm_processor_kwargs=lambda audios: {},
    )
    outputs = {}

    async def one(uid: str, index: int, split: str, text: str) -> None:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        output = loop.AgentLoopOutput(
            prompt_ids=[1, 7, 8], response_ids=ids, response_mask=[1] * len(ids), num_turns=2, metrics={}
        )
        fields = {"uid": uid, "session_id": index, "raw_prompt": PROMPT, "extra_info": {"split": split}}
        await loop.AgentLoopWorker._compute_score(worker, [output], fields | {"global_steps": 3, "data_source": "x"})
        outputs[uid, index] = output.reward_score, output.extra_fields["reward_extra_info"]

    async def run():
        groups = [("a", "train", WORDS), ("b", "test", WORDS[:4]), ("c", "train", WORDS[::-1])]
        asked = [one(uid, n, split, text) for uid, split, texts in groups for n, text in enumerate(texts)]
        await asyncio.gather(*asked)
        return groups

    for uid, _, texts in asyncio.run(run()):
        found = [outputs[uid, n] for n in range(len(texts))]
        assert [score for score, _ in found] == pytest.approx(win_rates(model, texts), abs=1e-5)
        assert all(extra == {} for _, extra in found)
