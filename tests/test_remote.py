"""A served model answers as the pipeline does, and every fault of its server is one clear line, never a number."""

import json
import os
import pickle
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from general_preference import GPMPipeline, get_reward_model
from general_preference.errors import InputError, NonFiniteError, RunError
from general_preference.inference import asking, head_server
from general_preference.inference.remote import RemotePreference
from general_preference.models.config import PreferenceConfig
from general_preference.models.heads import DIGEST, score_digest

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
HEADS = {
    "gpm": PreferenceConfig("gpm", 4, True, normalize=True, temperature=0.1),
    "scaled": PreferenceConfig("gpm", 4, True, "scaled_softmax", normalize=True, temperature=0.5),
    "ungated": PreferenceConfig("gpm", 2, normalize=True, temperature=0.1),
    "hybrid": PreferenceConfig("hybrid", 5, True, normalize=True, reward_offset=-0.25),
    "bt": PreferenceConfig(reward_offset=0.5),
}


class Server(ThreadingHTTPServer):
    """Answers as vLLM does, from the weights of an exported folder; `fault` changes that."""

    daemon_threads = True

    def __init__(self, folder: str, fault=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        self.fault, self.key, self.names, self.requests = fault, None, ["served"], []
        self.url = f"http://127.0.0.1:{self.server_port}"

    @torch.no_grad()
    def outputs(self, ids: list[int]) -> torch.Tensor:
        return self.model.score(self.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])

    def answer(self, route: str, body: dict) -> tuple[int, object]:
        """Status and reply of a good server."""
        if body["model"] != self.names[0]:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        rows = torch.stack([self.outputs(ids) for ids in body["input"]])
        if body.get("use_activation", True):
            rows = activated(rows, route)
        field = {"/classify": "probs", "/v1/embeddings": "embedding"}[route]
        data = [{"index": index, field: row} for index, row in enumerate(rows.tolist())]
        return 200, {"data": data, "usage": {"prompt_tokens": sum(map(len, body["input"]))}}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, {"data": [{"id": name} for name in self.server.names]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self.reply(401, {"error": "Unauthorized"})
        status, reply = self.server.answer(self.path, body)
        if self.server.fault:
            status, reply = self.server.fault(self, body, status, reply)
        if status:
            self.reply(status, reply)

    def reply(self, status: int, reply):
        text = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def activated(rows: torch.Tensor, route: str) -> torch.Tensor:
    """What vLLM makes of a head's numbers unless it is asked not to."""
    if route == "/v1/embeddings":
        return torch.nn.functional.normalize(rows, dim=-1)
    return rows.sigmoid() if rows.shape[1] == 1 else rows.softmax(dim=-1)


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory):
    """A function: name in HEADS -> (trained folder, the same in the layout of sequence classification)."""
    made = {}

    def make(name: str) -> tuple[str, str]:
        if name not in made:
            trained, exported = (str(tmp_path_factory.mktemp(name) / end) for end in ("trained", "exported"))
            base, preference = model_folder("llama"), HEADS[name]
            model = get_reward_model(base, bf16=False, preference=preference, seed=3)
            heads = [head.weight for head in (model.value_head, model.prompt_head) if head is not None]
            for weight in heads:
                weight.data *= 3
            model.save_pretrained(trained)
            twin = AutoModelForSequenceClassification.from_pretrained(base, num_labels=sum(map(len, heads)))
            twin.score.weight.data = torch.cat(heads).detach()
            twin.config.problem_type = "regression"
            twin.config.preference, twin.config.preference_digest = vars(preference), score_digest(twin.score.weight)
            assert hasattr(twin.config, DIGEST)
            twin.save_pretrained(exported)
            for folder in (trained, exported):
                AutoTokenizer.from_pretrained(base).save_pretrained(folder)
            made[name] = trained, exported
        return made[name]

    return make


@contextmanager
def serving(folder: str, fault=None):
    server = Server(folder, fault)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(asking, "RETRY_AFTER", (0.05, 0.1))


@pytest.fixture(scope="module")
def pair(folders):
    """A function: name in HEADS -> (the pipeline, a server of the same model)."""
    made = {}
    with ExitStack() as running:

        def make(name: str):
            if name not in made:
                made[name] = (
                    GPMPipeline(folders(name)[0], device="cpu"),
                    running.enter_context(serving(folders(name)[1])),
                )
            made[name][1].requests.clear()
            return made[name]

        yield make


def assert_same(rm, remote, prompts=PROMPTS, responses=RESPONSES):
    for expected, found in zip(rm.embed(prompts, responses), remote.embed(prompts, responses), strict=True):
        torch.testing.assert_close(found.embeddings, expected.embeddings, atol=1e-5, rtol=1e-5)
        assert (found.gate is None) == (expected.gate is None)
        if found.gate is not None:
            torch.testing.assert_close(found.gate, expected.gate, atol=1e-5, rtol=1e-5)
        assert torch.equal(found.scores(), -found.scores().T)


@pytest.mark.parametrize("api", ["classify", "embeddings"])
@pytest.mark.parametrize("name", HEADS)
def test_answers_are_those_of_the_pipeline(folders, pair, name, api):
    rm, server = pair(name)
    for folder in folders(name):
        remote = RemotePreference(server.url, folder, api=api)
        assert_same(rm, remote)
        for prompt, some in zip(PROMPTS[:2], RESPONSES, strict=False):
            assert remote.compare(prompt, *some[:2]) == pytest.approx(rm.compare(prompt, *some[:2]), abs=1e-5)
            matrix = remote.preference_matrix(prompt, some)
            torch.testing.assert_close(matrix, rm.preference_matrix(prompt, some), atol=1e-5, rtol=0)
            for method in ("borda", "copeland", "nash"):
                assert remote.rank(prompt, some, method) == rm.rank(prompt, some, method)
        for method in ("borda", "min"):
            for found, expected in zip(
                remote.score(PROMPTS, RESPONSES, method), rm.score(PROMPTS, RESPONSES, method), strict=True
            ):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert {route for route, _ in server.requests} == {head_server.APIS[api][0]}
    assert all(body["use_activation"] is False for _, body in server.requests)


def test_no_weights_are_needed_here(folders, pair, tmp_path):
    rm, server = pair("gpm")
    shutil.copytree(folders("gpm")[1], tmp_path / "settings", ignore=shutil.ignore_patterns("*.safetensors"))
    remote = pickle.loads(pickle.dumps(RemotePreference(server.url + "/v1/", tmp_path / "settings")))
    assert_same(rm, remote)
    (tmp_path / "settings/modules.json").write_text("[]")
    assert RemotePreference(server.url, tmp_path / "settings").server.api == "embeddings"
    assert GPMPipeline(folders("gpm")[1], device="cpu").compare("a", "b", "c") == pytest.approx(
        rm.compare("a", "b", "c")
    )


def test_sequences_are_asked_for_once_and_in_bounded_requests(folders, pair):
    rm, server = pair("gpm")
    assert RemotePreference(server.url, folders("gpm")[1]).embed([], []) == []
    assert server.requests == []
    remote = RemotePreference(server.url, folders("gpm")[1])
    assert remote.score_matrix(CHAT, ["scissors", "rock", "scissors"])[0, 2] == 0
    ((_, body),) = server.requests
    assert len(body["input"]) == 3  # two responses and the prompt
    server.requests.clear()
    assert_same(rm, RemotePreference(server.url, folders("gpm")[1], batch_size=4), PROMPTS * 2, RESPONSES * 2)
    assert [len(body["input"]) for _, body in server.requests] == [4, 4, 2]


def test_long_prompts_are_cut_as_by_the_pipeline(folders, pair, caplog):
    server = pair("gpm")[1]
    long = ["paper " * 40, "Which throw wins?"], [["rock", "rock " * 30], ["the scissors " * 30] * 2]
    rm = GPMPipeline(folders("gpm")[0], device="cpu", max_length=48)
    remote = RemotePreference(server.url, folders("gpm")[0], max_length=48)
    assert_same(rm, remote, *long)
    assert max(len(ids) for _, body in server.requests for ids in body["input"]) == 48
    assert vars(remote.cut) == vars(rm.cut)
    assert len({text for text in caplog.messages if "cut to 48 tokens" in text}) == 1  # both say the same


def test_rows_are_put_in_order(folders):
    def turned(handler, body, status, reply):
        return status, reply | {"data": reply["data"][::-1]}

    rm = GPMPipeline(folders("gpm")[0], device="cpu")
    with serving(folders("gpm")[1], turned) as server:
        assert_same(rm, RemotePreference(server.url, folders("gpm")[1]))


def hang(handler, body, status, reply):
    time.sleep(3)
    return None, None


def drop(handler, body, status, reply):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()
    return None, None


def cut_short(handler, body, status, reply):
    text = json.dumps(reply).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    handler.wfile.write(text[: len(text) // 2])
    handler.close_connection = True
    return None, None


def says(status, text):
    return lambda handler, body, *_: (status, text)


def rows(change):
    """A fault that changes the rows of a good answer."""

    def fault(handler, body, status, reply):
        values = torch.tensor([one["probs"] for one in reply["data"]])
        data = [{"index": index, "probs": row} for index, row in enumerate(change(values).tolist())]
        return status, reply | {"data": data}

    return fault


FAULTS = {
    "500": (
        says(500, b"{'message': 'CUDA\n out of memory'}" + b"x" * 999),
        RunError,
        "500 .*CUDA out of mem.*x.: look at",
    ),
    "400": (says(400, {"message": "maximum context length is 16"}), RunError, "length is 16.*: lower max_length"),
    "503": (says(503, b""), RunError, r"503 \(without a word\): ask again when it has loaded"),
    "302": (says(302, b"moved"), RunError, r"302 \(moved\): look at"),
    "html": (says(200, b"<html>\n<body>Hello"), RunError, r"no JSON \(<html> <body>Hello\): is the url that of vLLM"),
    "empty": (says(200, b""), RunError, r"no JSON \(without a word\)"),
    "no object": (says(200, [1.0]), RunError, "no data with index and probs"),
    "no index": (says(200, {"data": [{"probs": [0.0] * 6}] * 3}), RunError, "no data with index and probs"),
    "no numbers": (says(200, {"data": [{"index": 0, "probs": ["1"] * 6}] * 3}), RunError, "no data with index"),
    "null": (rows(lambda values: values / 0 * 0), NonFiniteError, "not finite: serve the model in bfloat16"),
    "hang": (hang, RunError, "has said nothing for 0.5 seconds: raise timeout"),
    "drop": (drop, RunError, "broke the connection off .*: look at the server's log"),
    "cut short": (cut_short, RunError, "broke the connection off .*: look at the server's log"),
    "too few": (rows(lambda values: values[1:]), RunError, "answers 2 rows, 2 of them different, to 3 sequences"),
    "too many": (rows(lambda values: values.repeat(2, 1)), RunError, "answers 6 rows, 6 of them different, to 3"),
    "twice": (
        lambda *some: (200, {"data": [one | {"index": 0} for one in some[-1]["data"]]}),
        RunError,
        "answers 3 rows, 1 of them different, to 3 sequences: expected one for each",
    ),
    "wrong width": (rows(lambda values: values[:, :4]), RunError, "answers 4 numbers a sequence, the heads have 6"),
    "no width": (rows(lambda values: values[:, :0]), RunError, "answers 0 numbers a sequence, the heads have 6"),
    "softmax": (
        rows(lambda values: values.softmax(-1)),
        RunError,
        "rows sum to 1, as after a softmax: .*use_activation",
    ),
    "normalized": (rows(lambda values: activated(values, "/v1/embeddings")), RunError, "norm 1: .* its normalization"),
    "truncated": (
        lambda *some: (200, some[-1] | {"usage": {"prompt_tokens": 9}}),
        RunError,
        r"read 9 tokens, but \d+ were",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_server_is_one_line(folders, name):
    fault, kind, said = FAULTS[name]
    with serving(folders("gpm")[1], fault) as server:
        remote = RemotePreference(server.url, folders("gpm")[1], timeout=0.5 if name == "hang" else 60)
        with pytest.raises(kind, match=said) as caught:
            remote.compare("Which throw wins?", "rock", "paper")
        message = str(caught.value)
        assert message.startswith(server.url) and "\n" not in message and len(message) < 400
        assert len(server.requests) == {"503": 3, "softmax": 2, "normalized": 2}.get(name, 1)
        server.fault = None  # and the same object goes on
        assert 0 <= remote.compare("Which throw wins?", "rock", "paper") <= 1


def test_nothing_listens(folders):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    remote = RemotePreference(url, folders("gpm")[1])
    with pytest.raises(
        RunError, match=rf"nothing answers at {url} \(.*refused\): start the server, or correct the url"
    ):
        remote.compare("a", "b", "c")


def test_a_server_that_starts_late_is_waited_for(folders, pair):
    rm, answers = pair("gpm")[0], [503, 503]

    def loading(handler, body, status, reply):
        return (answers.pop(), b"loading") if answers else (status, reply)

    with serving(folders("gpm")[1], loading) as server:
        assert_same(rm, RemotePreference(server.url, folders("gpm")[1]))


@pytest.mark.parametrize("row", [[0.1, 0.2, 0.3, 0.2, 0.1, 0.1], [0.6, 0.8, 0, 0, 0, 0]])
def test_numbers_that_look_activated_by_accident_are_taken(folders, row):
    def accident(handler, body, status, reply):
        return (200, {"data": [{"index": 0, "probs": row}]}) if len(body["input"]) == 1 else (status, reply)

    with serving(folders("gpm")[1], accident) as server:
        remote = RemotePreference(server.url, folders("gpm")[1])
        found = remote.server.outputs([(5, 6, 7, 8)])
        torch.testing.assert_close(found, torch.tensor([row]))


def test_rewards_from_0_to_1_are_told_from_a_sigmoid(folders, tmp_path):
    """A reward model of others: a server that heeds use_activation makes other numbers of it, or it is refused."""

    def small(handler, body, status, reply):
        values = torch.tensor([len(ids) / 100 for ids in body["input"]])
        values = values.sigmoid() if body["use_activation"] and heeds else values
        return status, {"data": [{"index": index, "probs": [one]} for index, one in enumerate(values.tolist())]}

    def configured(**settings) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folders("bt")[1], folder)
        config = json.loads((folder / "config.json").read_text())
        removed = ("preference", "preference_digest", "problem_type")
        config = {key: value for key, value in config.items() if key not in removed} | settings
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    with serving(folders("bt")[1], small) as server:
        heeds = True
        assert RemotePreference(server.url, configured()).compare("a", "b", "bcdefg") < 0.5
        assert [body["use_activation"] for _, body in server.requests] == [False, False, True]
        heeds = False
        for folder in (configured(), folders("bt")[0]):
            with pytest.raises(RunError, match=r"lie in \[0, 1\], as after a sigmoid: have it heed use_activation"):
                RemotePreference(server.url, folder).compare("a", "b", "bcdefg")
        for folder in (configured(problem_type="regression"), folders("bt")[1]):  # where vLLM has no sigmoid
            server.requests.clear()
            assert RemotePreference(server.url, folder).compare("a", "b", "bcdefg") < 0.5
            assert len(server.requests) == 1


def test_key_and_name_of_the_model(folders, monkeypatch):
    with serving(folders("bt")[1]) as server:
        folder, server.key = folders("bt")[1], "secret"
        monkeypatch.delenv("GPM_API_KEY", raising=False)
        with pytest.raises(RunError, match=r"status 401 .*: pass its api_key, or set GPM_API_KEY"):
            RemotePreference(server.url, folder).compare("a", "b", "c")
        RemotePreference(server.url, folder, api_key="secret").compare("a", "b", "c")
        monkeypatch.setenv("GPM_API_KEY", "secret\n")
        RemotePreference(server.url, folder).compare("a", "b", "c")
        server.names = ["served", "other"]
        with pytest.raises(InputError, match=r"serves 2 models \(served, other\): set served_model to one"):
            RemotePreference(server.url, folder).compare("a", "b", "c")
        RemotePreference(server.url, folder, served_model="served").compare("a", "b", "c")
        with pytest.raises(RunError, match=r"status 404 .*`mine` does not exist.*: set served_model, or api"):
            RemotePreference(server.url, folder, served_model="mine").compare("a", "b", "c")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"url": "localhost:8000"}, "url 'localhost:8000' is no address of a server, such as"),
        ({"url": "http://"}, "url 'http://' is no address"),
        ({"url": 8000}, "url 8000 is no address"),
        ({"api": "rerank"}, "unknown api 'rerank': choose auto, classify, embeddings"),
        ({"timeout": 0}, "timeout is 0, expected more than 0"),
        ({"batch_size": -1}, "batch_size is -1, expected more than 0"),
        ({"api_key": "ab\ncd"}, "^api_key holds characters that no HTTP header can: copy it again$"),
        ({"max_length": 3}, "max_length is 3, expected at least 8"),
        ({"tau": 3.0}, "was saved with temperature = 0.1, but 3.0 was asked for"),
        ({"model": "/nowhere/model"}, "model folder /nowhere/model does not exist"),
        ({"temperature": 1.0}, "RemotePreference has no argument 'temperature': did you mean tau?"),
    ],
)
def test_arguments_that_cannot_work_are_named(folders, arguments, said):
    with pytest.raises(InputError, match=said):
        RemotePreference(**{"url": "http://localhost:1", "model": folders("gpm")[0]} | arguments)


def test_httpx_that_is_missing_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(InputError, match="asking a server needs the package httpx: pip install httpx"):
        RemotePreference("http://localhost:1", folders("gpm")[0])


def test_waiting_can_be_interrupted(folders):
    with serving(folders("gpm")[1], hang) as server:
        remote, began = RemotePreference(server.url, folders("gpm")[1], served_model="served"), time.perf_counter()
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        try:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                remote.compare("a", "b", "c")
        finally:
            signal.signal(signal.SIGINT, before)
        assert time.perf_counter() - began < 2.5
