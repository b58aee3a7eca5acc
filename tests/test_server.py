"""A real server process answers every route as the pipeline does, many at a time, and never with a wrong number."""

import asyncio
import functools
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from benchmarks import serving
from general_preference import GPMPipeline
from general_preference.errors import InputError, RunError
from general_preference.inference import ranking
from general_preference.serving import AsyncGroupReward, GroupReward
from general_preference.serving.arguments import ServingArguments
from general_preference.serving.barrier import GroupBarrier, Place
from general_preference.serving.client import PreferenceClient
from general_preference.serving.refusal import Refused
from general_preference.serving.server import listen, read_key
from tests.test_remote import CHAT, PROMPTS, RESPONSES

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "scripts" / "serve_preference_model.py")
KEY = "correct horse"


class Process:
    """A server on a free port; its log is `log`."""

    def __init__(self, model: str, log: Path, *flags: str, key: str | None = None):
        self.log, self.key = log, key
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment.pop("GPM_API_KEY", None)
        environment |= {"GPM_API_KEY": key} if key else {}
        command = [sys.executable, SCRIPT, "--model", model, "--port", "0", *flags]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stderr=file, stdout=file, env=environment)

    def wait(self) -> "Process":
        """Until it is ready."""
        while not (found := re.search(r"on (http://127.0.0.1:(\d+))", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        self.url, self.port = found[1], found[2]
        return self

    def post(self, route: str, body, **options) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.post(self.url + route, json=body, timeout=60, headers=headers, verify=False, **options)

    def metric(self, name: str) -> float:
        text = httpx.get(self.url + "/metrics").text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def models(saved, tmp_path_factory) -> tuple[str, str]:
    """A model, and the same whose embedding of "~" is NaN."""
    rm = GPMPipeline(saved(), device="cpu")
    broken = str(tmp_path_factory.mktemp("broken") / "model")
    (token,) = rm.tokenizer("~", add_special_tokens=False)["input_ids"]
    rm.model.backbone.get_input_embeddings().weight.data[token] = float("nan")
    rm.model.save_pretrained(broken)
    rm.tokenizer.save_pretrained(broken)
    return saved(), broken


@pytest.fixture(scope="module")
def servers(models, tmp_path_factory):
    """A server with two workers, and one with a key, narrow limits and the model that is partly NaN."""
    logs = tmp_path_factory.mktemp("logs")
    narrow = ["--max_queue=2", "--max_body_mb=0.05", "--max_responses=8", "--max_tokens=400", "--group_timeout=1"]
    narrow += ["--group_size=2", "--max_wait_ms=20", "--end_texts=<|im_end|>", "--max_length=64"]
    both = [
        Process(models[0], logs / "wide.log", "--devices=cpu,cpu"),
        Process(models[1], logs / "narrow.log", *narrow, key=KEY),
    ]
    try:
        yield [one.wait() for one in both]
    finally:
        for one in both:
            one.end()


@pytest.fixture(scope="module")
def server(servers) -> Process:
    return servers[0]


@pytest.fixture(scope="module")
def narrow(servers) -> Process:
    return servers[1]


@pytest.fixture(scope="module")
def rm(models) -> GPMPipeline:
    return GPMPipeline(models[0], device="cpu")


def close(found, expected):
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(expected), atol=1e-5, rtol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize("mode", ["win_rate", "nash", "score", "planes"])
def test_group_rewards_over_the_server(server, models, mode):
    """The same rewards as with the model in memory, in a copy that traveled and awaited."""
    prompts, completions = ["Which?"] * 3 + ["Name one."] * 3, ["rock", "the paper", "", "scissors", "rock", "rock"]
    served = GroupReward(url=server.url, mode=mode, group_size=3)
    expected = GroupReward(models[0], mode, group_size=3, device="cpu")(prompts, completions)
    close(served(prompts, completions), expected)
    close(pickle.loads(pickle.dumps(served))(prompts, completions), expected)
    close(asyncio.run(AsyncGroupReward(url=server.url, mode=mode)(prompts, completions)), expected)


def test_answers_do_not_wait_for_acknowledgments():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as _:
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_compare_answers_as_the_pipeline(server, rm):
    for prompt, some in zip(PROMPTS, RESPONSES, strict=True):
        found = server.post("/compare", {"prompt": prompt, "responses": some, "return_embeddings": True}).json()
        (embedded,) = rm.embed([prompt], [some])
        close(found["matrix"], rm.preference_matrix(prompt, some))
        close(found["rewards"], ranking.borda(rm.preference_matrix(prompt, some)))
        close(found["embeddings"], embedded.embeddings)
        close(found["gate"], embedded.gate)
        assert found["cyclic_share"] == pytest.approx(ranking.hodge(embedded.scores()).cyclic_share, abs=1e-5)
    body = {"prompt": PROMPTS[0], "responses": RESPONSES[0]}
    assert server.post("/compare", body).json().keys() == {"rewards", "matrix", "cyclic_share", "model"}
    matrix, scores = (one(PROMPTS[0], RESPONSES[0]) for one in (rm.preference_matrix, rm.score_matrix))
    close(server.post("/compare", body | {"mode": "nash"}).json()["rewards"], ranking.nash(matrix))
    close(server.post("/compare", body | {"mode": "score"}).json()["rewards"], scores.sum(dim=1) / 3)
    assert sum(server.post("/compare", body | {"mode": "planes"}).json()["rewards"]) == pytest.approx(0, abs=1e-5)


def test_the_client_answers_as_the_pipeline(server, rm):
    client = PreferenceClient(server.url + "/")
    for found, expected in zip(client.embed(PROMPTS, RESPONSES), rm.embed(PROMPTS, RESPONSES), strict=True):
        close(found.embeddings, expected.embeddings)
        close(found.gate, expected.gate)
        assert torch.equal(found.scores(), -found.scores().T)
    assert client.preference == rm.preference and client.tau == rm.tau
    assert client.compare(CHAT, "rock", "paper") == pytest.approx(rm.compare(CHAT, "rock", "paper"), abs=1e-5)
    assert client.rank(CHAT, RESPONSES[0]) == rm.rank(CHAT, RESPONSES[0])
    for found, expected in zip(client.score(PROMPTS, RESPONSES), rm.score(PROMPTS, RESPONSES), strict=True):
        close(found, expected)
    assert client.show(CHAT, RESPONSES[0]).axes
    assert client.embed([], []) == []
    with pytest.raises(InputError, match="response 1 to prompt 0' is int 5, expected"):
        client.embed(["a"], [["b", 5]])


def test_many_at_once_are_all_answered_rightly_in_shared_calls(server, rm):
    bodies = [
        {"prompt": f"Question {n}: which?", "responses": [f"{n} rock", "paper " * (n % 5), "x"]} for n in range(64)
    ]
    before = {
        name: server.metric(name) for name in ("gpm_batch_rows_count", "gpm_batch_rows_sum", "gpm_responses_total")
    }
    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(lambda body: server.post("/compare", body), bodies))
    assert [answer.status_code for answer in answers] == [200] * 64
    for answer, body in zip(answers, bodies, strict=True):
        close(answer.json()["matrix"], rm.preference_matrix(**body))
    calls, rows, responses = (server.metric(name) - value for name, value in before.items())
    assert rows == 64 and responses == 3 * 64 and calls < 48, f"{calls} calls of the model for 64 requests"


def test_the_benchmark_asks_and_reads_what_it_reports(server, rm):
    bodies = serving.make_requests(24, 8)
    before = serving.metric(server.url, "gpm_batch_rows_sum")
    answers, latency, seconds = asyncio.run(serving.ask_all(server.url, bodies, 8))
    assert serving.metric(server.url, "gpm_batch_rows_sum") - before == len(answers) == len(latency) == 24
    assert seconds >= max(latency) and serving.resident(server.process.pid) > 10**8
    assert serving.largest_difference(rm, bodies, answers) < 1e-5
    answers[3] = answers[4]
    assert serving.largest_difference(rm, bodies, answers) > 0.01


def test_health_model_and_pages_are_there(server, rm):
    assert httpx.get(server.url + "/health").status_code == 200
    about = httpx.get(server.url + "/model").json()
    assert about["preference"] == vars(rm.preference) and about["devices"] == ["cpu", "cpu"]
    assert (about["dim"], about["temperature"], about["max_length"]) == (4, 0.1, rm.max_length)
    assert "/compare" in httpx.get(server.url + "/openapi.json").json()["paths"]
    assert httpx.get(server.url + "/docs").status_code == 200


BODY = {"prompt": "Which?", "responses": ["a", "b"]}
USER = {"role": "user", "content": "a"}


def calls(*found) -> dict:
    """An assistant's turn with tool calls."""
    return {"role": "assistant", "content": "", "tool_calls": list(found)}


def deep(levels: int) -> dict:
    """A tool call whose arguments are so deep."""
    return {"function": {"name": "f", "arguments": json.loads("[" * levels + "]" * levels)}}


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
REFUSED = {
    "calls": (BODY | {"prompt": [USER, calls(CALL)]}, 422, "^prompt: the prompt ends with the assistant's tool calls"),
    "no call": (BODY | {"prompt": [USER, calls({}), USER]}, 422, r"^'prompt' has a tool call .*, expected a function"),
    "no name": (BODY | {"responses": [[calls({"function": 1})], "b"]}, 422, "has a tool call .*, expected a function"),
    "deep call": (BODY | {"responses": [[calls(deep(600))], "b"]}, 422, "^the body is nested too deeply"),
    "letters": (BODY | {"prompt": "a" * 3300}, 422, "^prompt and responses: 3302 characters, this server takes 3200"),
    "no prompt": ({"responses": ["a"]}, 422, "^prompt: Field required"),
    "no responses": ({"prompt": "a", "responses": []}, 422, "^responses: List should have at least 1"),
    "a number": ({"prompt": "a", "responses": ["b", 5]}, 422, r"^'responses\[1\]' is int 5, expected text"),
    "no messages": ({"prompt": [], "responses": ["b"]}, 422, "^'prompt' is"),
    "a mode": (BODY | {"mode": "best"}, 422, "^mode: Input should be 'win_rate', 'nash'"),
    "unknown": (BODY | {"method": "nash"}, 422, "^method: Extra inputs are not permitted"),
    "a list": ([BODY], 422, "the body"),
    "surrogate": (b'{"prompt": "\\ud800", "responses": ["b"]}', 422, "half of a surrogate"),
    "no JSON": (b'{"prompt": "a"', 400, "the body is no JSON"),
    "nothing": (b"", 422, "the body: Field required"),
    "no UTF-8": (b'{"prompt": "\xff"}', 400, ""),
    "deep": (b"[" * 9000 + b"]" * 9000, 400, ""),
    "too large": (b" " * 60000, 413, "^the body is larger than 0.05 MB"),
    "too many": ({"prompt": "a", "responses": ["b"] * 9}, 422, "^responses: 9 of them, this server takes 8 at most"),
    "too long": ({"prompt": "a", "responses": ["rock"*50] * 8}, 422, "^prompt and responses: .* this server takes 400"),
    "NaN": ({"prompt": "a", "responses": ["b", "~"]}, 500, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scored_is_refused_by_name(narrow, name):
    body, status, said = REFUSED[name]
    options = {"content": body} if isinstance(body, bytes) else {"json": body}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(narrow.url + "/compare", headers=headers, timeout=30, **options)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"detail"} and re.search(said, answer.json()["detail"]), answer.text


def test_settings_that_cannot_work_are_refused(monkeypatch):
    with pytest.raises(InputError, match="--group_size 9 exceeds --max_responses 8: raise that"):
        ServingArguments(model="m", group_size=9, max_responses=8).check()
    monkeypatch.setenv("GPM_API_KEY", " ")
    with pytest.raises(InputError, match="GPM_API_KEY is white space"):
        read_key()


def test_other_content_types_are_named(server):
    answer = httpx.post(server.url + "/compare", content=json.dumps(BODY))
    assert answer.status_code == 415 and answer.json()["detail"].endswith("send content-type: application/json")


def test_the_key_and_unknown_routes(narrow, monkeypatch):
    for headers in (
        {},
        {"Authorization": "Bearer other"},
        {"Authorization": KEY},
        {"Authorization": "Bearer ü".encode()},
    ):
        for route in ("/compare", "/nowhere"):
            assert httpx.post(narrow.url + route, json=BODY, headers=headers).status_code == 401
        assert httpx.get(narrow.url + "/openapi.json", headers=headers).status_code == 401
        assert httpx.get(narrow.url + "/health", headers=headers).status_code == 200
    assert narrow.post("/nowhere", BODY).status_code == 404
    assert httpx.post(narrow.url + "/compare", json=BODY, headers={"Authorization": f"bearer {KEY}"}).status_code == 200
    assert narrow.metric('gpm_requests_total{route="unknown"') > 0
    monkeypatch.delenv("GPM_API_KEY", raising=False)
    with pytest.raises(RunError, match=r"/compare answered with status 401 .*: pass its api_key, or set GPM_API_KEY"):
        PreferenceClient(narrow.url).score_matrix("a", ["b"])
    with pytest.raises(RunError, match=r"status 500 .*not finite.*: look at the server's log"):
        PreferenceClient(narrow.url, api_key=KEY).score_matrix("a", ["b", "~"])
    assert PreferenceClient(narrow.url, api_key=KEY).compare("a", "b", "b") == 0.5


def test_compare_answers_nemo_gym(server, rm):
    objects = [response(text) for text in RESPONSES[0]]
    found = server.post("/compare", {"conversation_history": CHAT, "response_objs": objects, "principle": None}).json()
    assert found.keys() == {"rewards", "comparison_results", "metrics"} and found["comparison_results"] == []
    close(found["rewards"], ranking.borda(rm.preference_matrix(CHAT, RESPONSES[0])))
    for more, said in (
        ({"prompt": "a"}, "^prompt: Extra inputs are not permitted"),
        ({"principle": "Be kind"}, "^principle is not read"),
        ({"response_objs": [{"text": "a"}]}, r"^response_objs\[0\] has no list 'output'"),
    ):
        answer = server.post("/compare", {"conversation_history": CHAT, "response_objs": objects} | more)
        assert answer.status_code == 422 and re.search(said, answer.json()["detail"]), answer.text


def test_rerank_in_three_shapes(server, rm):
    query, texts = "Which throw wins?", ["The rock.", "Paper, of course.", "scissors", "rock äöü"]
    wins = ranking.borda(rm.preference_matrix(query, texts)).tolist()
    order = sorted(range(4), key=lambda index: -wins[index])
    answer = server.post("/rerank", {"query": query, "texts": texts, "return_text": True})
    assert "mean probability of winning" in answer.headers["X-Relevance-Score"]
    assert [(one["index"], one["text"]) for one in answer.json()] == [(index, texts[index]) for index in order]
    close([one["score"] for one in answer.json()], sorted(wins, reverse=True))
    raw = server.post("/rerank", {"query": query, "texts": texts, "raw_scores": True}).json()
    close(sorted(one["score"] for one in raw), (rm.score_matrix(query, texts).sum(dim=1) / 3).sort().values)
    assert raw[0].keys() == {"index", "score"}
    body = {"query": query, "documents": [texts[0], *({"text": text} for text in texts[1:])], "top_n": 2}
    jina = server.post("/v1/rerank", body | {"return_documents": True}).json()
    assert jina["usage"]["total_tokens"] > 20 and jina["results"][0]["document"] == {"text": texts[order[0]]}
    cohere = server.post("/v2/rerank", body | {"model": jina["model"]}).json()
    assert cohere["id"] and "winning against the other" in cohere["meta"]["relevance_score"]
    for found in (jina, cohere):
        assert [one["index"] for one in found["results"]] == order[:2]
        close([one["relevance_score"] for one in found["results"]], [wins[index] for index in order[:2]])
    answer = server.post("/v2/rerank", body | {"model": "rerank-v3.5"})
    assert answer.status_code == 404 and "'rerank-v3.5' is not served here" in answer.json()["detail"]
    answer = server.post("/v1/rerank", body | {"documents": [{"title": "a"}]})
    assert answer.status_code == 422 and "documents[0] is no text" in answer.json()["detail"]


def test_text_that_does_not_fit_is_cut_and_counted_or_refused(narrow):
    body = {"query": "paper " * 40, "texts": ["rock", "paper"]}
    assert narrow.post("/rerank", body).status_code == 200
    answer = narrow.post("/rerank", body | {"truncate": False})
    assert answer.status_code == 413 and "exceed 64 tokens" in answer.json()["detail"]
    assert narrow.metric('gpm_cut_total{what="prompt"}') >= 2


def response(text: str) -> dict:
    """A finished object of OpenAI's Responses API."""
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"id": "resp", "object": "response", "output": [thought, message("assistant", content)]}


def message(role: str, content) -> dict:
    return {"type": "message", "role": role, "content": content}


def verify(group, index: int, text: str, prompt="Which throw wins?", **more) -> dict:
    params = {"input": [message("user", [{"type": "input_text", "text": prompt}])], "temperature": 1.0}
    own = {"responses_create_params": params, "response": response(text), "_ng_group_id": group}
    return own | {"_ng_rollout_index": index, "group_size": 4, "note": "kept"} | more


def slime(group, index: int, text: str, prompt="Which throw wins?", size: int = 4, **more) -> dict:
    label = {"group": {"id": group, "size": size, "index": index} | more}
    return {"prompt": prompt, "response": text, "label": label}


def together(server: Process, route: str, bodies: list[dict]) -> list[httpx.Response]:
    """Answers of requests that are sent at once, out of order."""
    order = sorted(range(len(bodies)), key=lambda index: -index % 3)
    with ThreadPoolExecutor(len(bodies)) as threads:
        found = dict(zip(order, threads.map(lambda index: server.post(route, bodies[index]), order), strict=True))
    return [found[index] for index in range(len(bodies))]


def test_samples_wait_for_their_siblings(server, rm):
    """Two groups of the same prompt side by side, and a second attempt of one, over all routes."""
    some, others = RESPONSES[0], ["x", "y y", "The rock.", "z"]
    wins = [ranking.borda(rm.preference_matrix(PROMPTS[0], texts)) for texts in (some, others)]
    rows = [("one", 0, some), ("two", 0, others), ("one", 1, others)]
    gym = [
        verify(group, n, text, _ng_group_attempt=attempt)
        for group, attempt, texts in rows
        for n, text in enumerate(texts)
    ]
    answers = [answer.json() for answer in together(server, "/verify", gym)]
    close([answer.pop("reward") for answer in answers], torch.cat([wins[0], wins[1], wins[1]]))
    assert answers == gym, "everything else comes back"
    for route in ("/", "/reward"):
        bodies = [
            slime(route + str(n), m, text) for n, texts in enumerate((some, others)) for m, text in enumerate(texts)
        ]
        close([answer.json()["reward"] for answer in together(server, route, bodies)], torch.cat(wins))
    assert server.metric("gpm_waiting_groups") == 0


def test_samples_of_openrlhf(server, narrow, rm):
    prompt = "<|im_start|>user\nWhich throw wins?<|im_end|>\n<|im_start|>assistant\n"
    some = ["The rock.", "Paper, of course."]
    bodies = []
    for index, text in enumerate(some):
        label = {"messages": CHAT, "group": {"id": "rlhf", "size": 2, "index": index}}
        bodies.append({"query": [prompt + text], "prompts": [prompt], "labels": [json.dumps(label)]})
    answers = [answer.json() for answer in together(server, "/get_reward", bodies)]
    close([answer["rewards"][0] for answer in answers], rm.preference_matrix(CHAT, some)[[0, 1], [1, 0]])
    assert all(answer["scores"] == answer["rewards"] and answer["extra_logs"] == {} for answer in answers)
    two = {
        "query": ["Q: a", "Q: b"],
        "prompts": ["Q: "] * 2,
        "labels": [{"reference": "c"}, {"reference": "a", "prompt": CHAT}],
    }
    close(server.post("/get_reward", two).json()["rewards"], [rm.compare("Q: ", "a", "c"), rm.compare(CHAT, "b", "a")])
    ended = {"query": [prompt + "a<|im_end|>\n"], "prompts": [prompt], "labels": [{"messages": CHAT, "reference": "b"}]}
    answer = narrow.post("/get_reward", ended)  # which was started with this end token
    assert answer.json()["rewards"] == pytest.approx([rm.compare(CHAT, "a", "b")], abs=1e-5), answer.text
    for change, said in (
        (ended, r"ends with '<\|im_end\|>', .* among end_texts"),
        (bodies[0] | {"labels": [{}]}, r"^labels\[0\] names neither: expected .*group.*or .*reference"),
        (bodies[0] | {"labels": [None]}, r"^labels\[0\] is missing: expected"),
        (bodies[0] | {"labels": ["4"]}, r"^labels\[0\] is no object"),
        (bodies[0] | {"labels": ["four"]}, r"^labels\[0\] is text that is no JSON"),
        (bodies[0] | {"labels": [{"reference": "a", "answer": 4}]}, r"^labels\[0\].answer: Extra inputs"),
        (bodies[0] | {"labels": [{"group": {"id": 1, "size": 2}}]}, r"^labels\[0\].group.index: Field required"),
        (bodies[0] | {"labels": [{"reference": "a"}]}, "in a chat template .*which is the policy's: put its messages"),
        (
            bodies[0] | {"query": ["other"], "labels": [{"reference": "a", "prompt": "b"}]},
            "does not begin with its prompt",
        ),
        (bodies[0] | {"labels": []}, "1 queries, 1 prompts, 0 labels"),
    ):
        answer = server.post("/get_reward", change)
        assert answer.status_code == 422 and re.search(said, answer.json()["detail"]), answer.text


def test_what_was_sent_comes_back_as_it_was(server):
    """Half of a surrogate pair and infinity in fields that no one reads; agents ask for a session first."""
    assert server.post("/seed_session", {"seed": 1}).json() == {}
    odd = {"echoed": "\ud800", "log_probs": [float("-inf")]}
    bodies = [json.dumps(verify("odd\ud800", index, text, group_size=2, **odd)) for index, text in enumerate("ab")]
    headers = {"content-type": "application/json"}
    with ThreadPoolExecutor(2) as threads:
        ask = functools.partial(httpx.post, server.url + "/verify", headers=headers, timeout=30)
        answers = list(threads.map(lambda body: ask(content=body), bodies))
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert [answer.json() | {"reward": 0} for answer in answers] == [
        json.loads(body) | {"reward": 0} for body in bodies
    ]


def test_a_sample_that_cannot_be_scored_is_refused_at_once_and_alone(narrow):
    """Its siblings wait for a better one; sizes beyond the limit would never be scored."""
    good, bad = (verify("bad", index, text, group_size=2) for index, text in enumerate("ab"))
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(narrow.post, "/verify", good)
        output = [{"type": "message", "role": "assistant", "content": 5}]
        answer = narrow.post("/verify", bad | {"response": {"output": output}})
        assert answer.status_code == 422 and not waiting.done(), answer.text
        assert narrow.post("/verify", bad).status_code == waiting.result().status_code == 200
    for size in (0, 9, 10**12):
        answer = narrow.post("/verify", verify("size", 0, "a", group_size=size))
        assert answer.status_code == 422 and f"{size}" in answer.text, answer.text
    many = {"query": ["ab"] * 9, "prompts": ["a"] * 9, "labels": [{"reference": "c"}] * 9}
    assert narrow.post("/get_reward", many).json() == {"detail": "9 samples, this server takes 2 at once: send fewer"}


def test_a_group_that_is_whole_in_time_is_scored(monkeypatch):
    """Its last sample comes just before the deadline, while the event loop is busy."""
    scored = []

    async def score(_, responses):
        scored.append(responses)
        if "bad" in responses:
            raise RunError("no score")
        return [1.0, 0.0]

    async def meet(group: str, late: str):
        barrier = GroupBarrier(score, 0.2, most=2)
        first = asyncio.create_task(barrier.reward(Place(group, 0, 2, 0), "p", "x"))
        await asyncio.sleep(0.1)
        last = asyncio.create_task(barrier.reward(Place(group, 0, 2, 1), "p", late))
        await asyncio.sleep(0)
        time.sleep(0.15)  # the deadline passes before the loop goes on
        found = await asyncio.gather(first, last, return_exceptions=True)
        return barrier, found

    barrier, found = asyncio.run(meet("g", "y"))
    assert found == [1.0, 0.0] and scored == [["x", "y"]] and len(barrier) == 0
    assert [str(error) for error in asyncio.run(meet("g", "bad"))[1]] == ["no score"] * 2

    async def closed():
        barrier.close()
        await barrier.reward(Place("h", 0, 2, 0), "p", "x")

    with pytest.raises(Refused, match="the server stops"):
        asyncio.run(closed())


def test_a_lost_sibling_is_an_error_and_the_group_can_be_sent_again(narrow):
    first, second = (verify("lost", index, text, group_size=None) for index, text in enumerate(["a", "b"]))
    began = time.perf_counter()
    answer = narrow.post("/verify", first)
    assert answer.status_code == 504 and 0.9 < time.perf_counter() - began < 5
    assert answer.json() == {"detail": "group 'lost', attempt 0: 1 of 2 samples came within 1 seconds, index 1 did not"}
    assert [answer.status_code for answer in together(narrow, "/verify", [first, second])] == [200, 200]
    answers = together(narrow, "/verify", [verify("nan", index, text, group_size=2) for index, text in enumerate("a~")])
    assert [answer.status_code for answer in answers] == [500, 500] and "not finite" in answers[0].text


def test_retries_get_the_same_answer_and_other_samples_are_refused(server, rm):
    some = ["a", "b b", "c"]
    bodies = [slime("again", index, text, size=3) for index, text in enumerate(some)]
    wins = ranking.borda(rm.preference_matrix(PROMPTS[0], some))
    with pytest.raises(httpx.ReadTimeout):  # whoever asked first is gone, but the sample is not
        httpx.post(server.url + "/reward", json=bodies[0], timeout=0.3)
    for change in ({"response": "other"}, {"prompt": "other"}):
        assert server.post("/reward", bodies[0] | change).status_code == 409
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(server.post, "/reward", body) for body in (bodies[0], bodies[1], bodies[1])]
        last = server.post("/reward", bodies[2])
        close([one.result().json()["reward"] for one in waiting] + [last.json()["reward"]], wins[[0, 1, 1, 2]])
    before = server.metric("gpm_responses_total")
    close(server.post("/reward", bodies[0]).json()["reward"], wins[0])
    assert server.metric("gpm_responses_total") == before, "a retry is not scored again"
    assert "another response came before" in server.post("/reward", bodies[0] | {"response": "d"}).json()["detail"]
    for place in ({"index": 3}, {"index": -1}, {"size": 1, "index": 0}):
        label = {"group": bodies[0]["label"]["group"] | place}
        answer = server.post("/reward", bodies[0] | {"label": label})
        assert answer.status_code == 422 and "expected an index from 0 to size - 1" in answer.text
    answer = server.post("/verify", verify("sizeless", 0, "a", group_size=None))
    assert answer.status_code == 422 and answer.json()["detail"].startswith("group_size: how many samples")
    items = [{"type": "computer_call"}]
    answer = server.post("/verify", verify("odd", 0, "a") | {"response": {"output": items}})
    assert answer.status_code == 422 and "response.output[0] is of type 'computer_call'" in answer.text


def test_what_is_not_finite_spoils_nothing_else(narrow, models):
    rm = GPMPipeline(models[1], device="cpu")
    for _ in range(3):
        bad, good = together(narrow, "/compare", [BODY | {"responses": ["~", "b"]}, BODY])
        assert (bad.status_code, good.status_code) == (500, 200)
        close(good.json()["matrix"], rm.preference_matrix(**BODY))


def test_a_full_queue_refuses_and_the_client_waits(narrow, rm):
    bodies = [{"prompt": f"Question {n}", "responses": ["a", f"{n} b"]} for n in range(24)]
    answers = together(narrow, "/compare", bodies)
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer, body in zip(answers, bodies, strict=True):
        if answer.status_code == 429:
            assert answer.headers["Retry-After"] == "1" and "2 requests wait already" in answer.json()["detail"]
        else:
            close(answer.json()["matrix"], rm.preference_matrix(**body))
    client = PreferenceClient(narrow.url, api_key=KEY)
    found = client.score([body["prompt"] for body in bodies], [body["responses"] for body in bodies])
    close(torch.stack(found), torch.stack(rm.score(*zip(*[body.values() for body in bodies], strict=True))))


def test_a_second_server_on_the_port_says_so(server, models, tmp_path):
    second = Process(models[0], tmp_path / "log", "--port", server.port)
    assert second.process.wait(60) == 2
    (line,) = second.log.read_text().splitlines()
    assert re.match(
        rf"error: cannot listen on 127.0.0.1 port {server.port} \(.*in use.*: choose another host or port", line
    )


def test_a_dead_worker_ends_the_server_with_an_error(narrow):
    """Ends `narrow`."""
    children = Path(f"/proc/{narrow.process.pid}/task/{narrow.process.pid}/children").read_text().split()
    (worker,) = (pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    with ThreadPoolExecutor(1) as threads, httpx.Client(base_url=narrow.url) as open_connection:
        assert open_connection.get("/health").json() == {"status": "ready"}
        waiting = threads.submit(narrow.post, "/verify", verify("dead", 0, "a", group_size=2))
        time.sleep(0.3)
        os.kill(int(worker), signal.SIGKILL)
        assert waiting.result().status_code == 503
        health = open_connection.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "broken"})
    assert narrow.process.wait(20) == 1
    assert "\nerror: a worker process has died" in narrow.log.read_text()


def test_sigterm_answers_what_was_accepted(server, rm):
    """Ends `server`."""
    body = {"prompt": PROMPTS[0], "responses": RESPONSES[0]}
    expected, answers, stop = rm.preference_matrix(**body), [], threading.Event()

    def ask():
        while not stop.is_set():
            began = time.monotonic()
            try:
                answers.append((began, server.post("/compare", body), time.monotonic()))
            except httpx.HTTPError as error:
                answers.append((began, error, time.monotonic()))
                return

    text = json.dumps(slime("late", 0, "a")).encode()
    head = f"POST /reward HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    slow, silent = (socket.create_connection(("127.0.0.1", int(server.port))) for _ in range(2))
    for one in (slow, silent):
        one.sendall(head.encode() + text[:-5])
    with slow, silent, ThreadPoolExecutor(17) as threads:
        waiting = threads.submit(server.post, "/reward", slime("stopped", 0, "a"))
        for _ in range(16):
            threads.submit(ask)
        waited = time.monotonic()
        while len(answers) <= 48 and time.monotonic() < waited + 30:
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        ended = time.monotonic()
        time.sleep(0.1)
        slow.sendall(text[-5:])  # a body that is whole too late; the other one never is
        assert b" 503 " in slow.recv(1000)
        code = server.process.wait(30)
        stop.set()
        assert waiting.result().status_code == 503 and "before this group is whole" in waiting.result().text
    assert code == 0, server.log.read_text()
    good = [one for one in answers if isinstance(one[1], httpx.Response) and one[1].status_code == 200]
    others = [one for one in answers if one not in good]
    for _, answer, _ in good:
        close(answer.json()["matrix"], expected)
    assert len(good) > 16 and all(began > ended - 1 for began, *_ in others), others
    refused = {str(getattr(answer, "status_code", type(answer).__name__)) for _, answer, _ in others}
    assert refused <= {"503", "ConnectError", "ReadError"}, refused
    # A reset is of the listener's backlog, which is closed when all that was accepted has been answered, 50 ms or more
    # after the signal. Threads of a busy client note the two in either order: a reset 3 ms too early was seen.
    last = max(answered for *_, answered in good) - 0.02
    assert all(failed > last for _, answer, failed in others if isinstance(answer, httpx.ReadError)), others
    assert not re.search("Traceback|Warning", server.log.read_text()), server.log.read_text()
