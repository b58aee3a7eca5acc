"""A real server process answers every route as the pipeline does, many at a time, and never with a wrong number."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from general_preference import GPMPipeline
from general_preference.errors import InputError, RunError
from general_preference.inference import ranking
from general_preference.serving.client import PreferenceClient

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "scripts" / "serve_preference_model.py")
KEY = "correct horse"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, friend!"},
    {"role": "user", "content": "Which throw wins?"},
]
PROMPTS = ["Which throw wins?", CHAT, "Écris « bonjour » 🙂"]
RESPONSES = [
    ["The rock.", "Paper, of course.", "", "rock äöü 你好 " * 4],
    ["scissors", "rock", "scissors"],
    ["bonjour"],
]


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
        return httpx.post(self.url + route, json=body, timeout=60, headers=headers, **options)

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
    narrow += ["--group_size=2", "--max_wait_ms=20", "--max_length=64"]
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


def test_health_model_and_pages_are_there(server, rm):
    assert httpx.get(server.url + "/health").status_code == 200
    about = httpx.get(server.url + "/model").json()
    assert about["preference"] == vars(rm.preference) and about["devices"] == ["cpu", "cpu"]
    assert (about["dim"], about["temperature"], about["max_length"]) == (4, 0.1, rm.max_length)
    assert "/compare" in httpx.get(server.url + "/openapi.json").json()["paths"]
    assert httpx.get(server.url + "/docs").status_code == 200


BODY = {"prompt": "Which?", "responses": ["a", "b"]}
REFUSED = {
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
    assert narrow.metric('gpm_requests_total{route="unknown"') > 0
    monkeypatch.delenv("GPM_API_KEY", raising=False)
    with pytest.raises(RunError, match=r"/compare answered with status 401 .*: pass its api_key, or set GPM_API_KEY"):
        PreferenceClient(narrow.url).score_matrix("a", ["b"])
    with pytest.raises(RunError, match=r"status 500 .*not finite.*: look at the server's log"):
        PreferenceClient(narrow.url, api_key=KEY).score_matrix("a", ["b", "~"])
    assert PreferenceClient(narrow.url, api_key=KEY).compare("a", "b", "b") == 0.5
