"""The README.md of a saved model, and its upload through the real hub client to a hub on this machine."""

import json
import os
import subprocess
import sys
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load

from general_preference import RewardModel
from general_preference.models.config import PreferenceConfig
from general_preference.models.saving import CardFacts, model_card

ROOT = Path(__file__).resolve().parents[1]
RESULTS = {"easy": {"accuracy": 0.9, "loss": 0.25, "n": 40}, "hard set": {"accuracy": 0.625, "loss": 0.6, "n": 8}}


def test_the_card_says_what_the_hub_expects(make_model, tmp_path):
    model = make_model()
    local = tmp_path / "data" / "train.jsonl"
    local.parent.mkdir()
    local.write_text("{}")
    model.card = CardFacts("owner/base-lm", ["owner/comparisons@train", str(local)], RESULTS)
    model.save_pretrained(tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.base_model == "owner/base-lm" and card.data.datasets == ["owner/comparisons"]
    assert card.data.library_name == "general-preference" and {"reward-model", "gpm"} <= set(card.data.tags)
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert found == {(name, metric): value for name, row in RESULTS.items() for metric, value in row.items()}
    assert "`data/train.jsonl`" in card.text and str(tmp_path) not in card.content
    assert "| hard set | 0.6250 | 0.6000 | 8 |" in card.text and "sigmoid(score / 0.1)" in card.text
    modes = {file.stat().st_mode for file in (tmp_path / "model").iterdir()}
    assert len(modes) == 1, "whoever can read the configuration can read the weights"
    again = RewardModel.from_pretrained(str(tmp_path / "model"))
    assert again.card == CardFacts("owner/base-lm", ["owner/comparisons"], RESULTS)


@pytest.mark.parametrize(
    "preference",
    [PreferenceConfig(), PreferenceConfig("gpm", 6, True), PreferenceConfig("hybrid", 3)],
)
def test_every_head_has_a_card_without_facts(preference):
    card = model_card(preference, CardFacts(), tags=["extra"])
    assert "No evaluation was recorded." in card.text and "extra" in card.data.tags
    assert card.data.eval_results is None and card.data.base_model is None


def test_a_local_base_model_is_named_in_the_text_alone(model_folder, tmp_path):
    card = model_card(PreferenceConfig(), CardFacts(model_folder("llama")))
    assert card.data.base_model is None and "Base model: `model`" in card.text


def test_a_readme_of_someone_else_is_not_misread(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    for text in (
        "no metadata",
        "---\nlibrary_name: other\ndatasets: [a/b]\n---\n",
        "---\n: [broken\n---\n",
        "---\n1: 2\n---\n",
    ):
        (tmp_path / "README.md").write_text(text)
        assert RewardModel.from_pretrained(str(tmp_path)).card == CardFacts()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as creating a repository and committing to it needs."""

    files: dict[str, bytes]  # path in the repository -> content
    commits: list[dict]

    def do_HEAD(self):
        known = self.path.rpartition("/")[2] in self.files
        self._answer(200 if known else 404, {}, {} if known else {"X-Error-Code": "EntryNotFound"})

    def do_GET(self):
        self._answer(200, {"name": "owner", "type": "user"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/api/repos/create"):
            host = self.headers["Host"]
            self._answer(200, {"url": f"http://{host}/owner/name", "name": "owner/name", "id": "1"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            entries = [json.loads(line) for line in body.splitlines()]
            self.commits.append(next(entry["value"] for entry in entries if entry["key"] == "header"))
            values = [entry["value"] for entry in entries if entry["key"] == "file"]
            self.files |= {value["path"]: b64decode(value["content"]) for value in values}
            host = self.headers["Host"]
            self._answer(200, {"commitUrl": f"http://{host}/owner/name/commit/1", "commitOid": "1", "success": True})
        else:
            self._answer(200, {})

    def _answer(self, code: int, value, headers: dict | None = None):
        content = json.dumps(value).encode()
        self.send_response(code)
        for name, text in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(0 if self.command == "HEAD" else len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def test_push_to_hub_uploads_what_loads_again(make_model, tmp_path):
    model = make_model()
    model.card = CardFacts("owner/base-lm", [], RESULTS)
    model.save_pretrained(tmp_path / "model")
    handler = type("ThisHub", (Hub,), {"files": {}, "commits": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from general_preference import RewardModel\n"
        f"model = RewardModel.from_pretrained({str(tmp_path / 'model')!r})\n"
        "print(model.push_to_hub('name', commit_message='first', tags=['mine'], private=True).oid)\n"
        "model.push_to_hub('name')"
    )
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
    }  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    assert [commit["summary"] for commit in handler.commits] == ["first", "Upload model"]
    assert {"config.json", "model.safetensors", "README.md"} <= set(handler.files)
    assert "value_head.weight" in load(handler.files["model.safetensors"])
    assert json.loads(handler.files["config.json"])["preference"]["dim"] == 4
    card = ModelCard(handler.files["README.md"].decode())
    assert "mine" in card.data.tags, "the second push keeps the README.md that stands there"
    assert card.data.base_model == "owner/base-lm" and "| easy | 0.9000 |" in card.text
