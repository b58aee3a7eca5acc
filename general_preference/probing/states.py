"""The hidden states that heads read, computed once by a frozen backbone and kept on disk.

`states.npy` holds one row for each distinct prompt and each distinct response to it; comparisons are indices into it.
Which prompts share a call depends on the data alone, so a run that was killed, or that had other processes, writes the
same file.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from general_preference.datasets.packing import preference_terms
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.files import lock_folder, read_object, replace_text, writing
from general_preference.inference.embedding import embed
from general_preference.models.backbone import PackedBackbone
from general_preference.models.loading import load_backbone

logger = logging.getLogger(__name__)

CHUNK_TOKENS = 16384  # computed together and marked as done together: what a kill costs at most
_SETTINGS, _STATES, _DONE = "settings.json", "states.npy", "done.npy"


class FrozenBackbone(PackedBackbone):
    """A backbone that embeds a response as the hidden state of its last token."""

    def forward(self, input_ids, position_ids, segments, shared, response_ends, prompt_ends, sequences=None, **_):
        """As `RewardModel.forward`; embeddings: (N, hidden)."""
        hidden, _ = self.hidden_states(input_ids, position_ids, segments, shared, sequences)
        return {"embeddings": hidden[response_ends], "prompt_hidden_states": hidden[prompt_ends]}


def load_frozen(path: str, dtype: torch.dtype, attention: str, trust_remote_code: bool, device) -> FrozenBackbone:
    """The backbone at `path`, a language or preference model, ready to run on `device`.

    Raises:
        InputError: no such model, or a kernel that cannot run there.
    """
    device = torch.device(device)
    model = FrozenBackbone(load_backbone(path, dtype, attention, trust_remote_code, device=device), attention)
    model.to(device).check_sharing()
    model.eval().layout_on(device)
    return model


@dataclass(frozen=True)
class Placed:
    """A comparison whose states are rows of `states.npy`.

    prompt: row of its prompt. responses: (K,) rows. lengths: (K,) tokens. The others as in `preparation.TOKENIZED`.
    """

    id: str
    subset: str
    prompt_key: str
    prompt: int
    responses: list[int]
    lengths: list[int]
    first: list[int]
    second: list[int]
    label: list[float]
    margin: float
    length: int

    @property
    def outcomes(self) -> list[tuple[int, int]]:
        """Rows of (winner, loser) of the preferences; of a tie the same row twice."""
        preferences = zip(self.first, self.second, self.label, strict=True)
        return [(self.responses[a], self.responses[b if label > 0.5 else a]) for a, b, label in preferences]

    def terms(self, weight: float) -> dict:
        """What `packing.preference_terms` reads."""
        names = ("first", "second", "label", "margin")
        return {name: getattr(self, name) for name in names} | {"weight": weight, "response_ids": self.responses}


def place_states(tables: Iterable) -> tuple[list[dict], list[list[Placed]]]:
    """(distinct prompts with their distinct responses, in order of appearance; the comparisons of each table).

    tables: tokenized, with the columns of `preparation.TOKENIZED`. Ids become int32 arrays: as lists, a million
    comparisons of 550 tokens would be 25 GB.
    """
    kept = ("id", "subset", "prompt_key", "first", "second", "label", "margin", "length")
    numbers: dict[bytes, int] = {}
    prompts: list[dict] = []
    known: list[dict[bytes, int]] = []
    found = []
    for table in tables:
        found.append([])
        for row in table:
            key = _key(row["prompt_ids"])
            number = numbers.setdefault(key, len(prompts))
            if number == len(prompts):
                prompts.append({"id": row["id"], "prompt_ids": _ids(key), "response_ids": []})
                known.append({})
            places = []
            for key in map(_key, row["response_ids"]):
                places.append(known[number].setdefault(key, len(known[number])))
                if places[-1] == len(prompts[number]["response_ids"]):
                    prompts[number]["response_ids"].append(_ids(key))
            lengths = list(map(len, row["response_ids"]))
            found[-1].append(({name: row[name] for name in kept} | {"lengths": lengths}, number, places))
    starts = state_rows(prompts)

    def placed(row: dict, number: int, places: list[int]) -> Placed:
        return Placed(prompt=starts[number], responses=[starts[number] + 1 + place for place in places], **row)

    return prompts, [[placed(*one) for one in some] for some in found]


def _key(ids: list[int]) -> bytes:
    return np.asarray(ids, dtype=np.int32).tobytes()


def _ids(key: bytes) -> np.ndarray:
    return np.frombuffer(key, dtype=np.int32)


def state_rows(prompts: list[dict]) -> list[int]:
    """The row of each prompt's state, before those of its responses; the number of all rows last."""
    return [0, *np.cumsum([1 + len(one["response_ids"]) for one in prompts]).tolist()]


class StateStore:
    """A folder with the hidden states of prompts and responses, as far as they are computed."""

    def __init__(self, folder: Path, prompts: list[dict], hidden_size: int, settings: dict):
        """settings: what the states depend on besides the tokens. Nothing is written before `open`."""
        self.folder, self.prompts, self.starts = folder, prompts, state_rows(prompts)
        self.chunks = _chunks(prompts)
        digest = hashlib.blake2b(digest_size=16)
        for ids in (ids for one in prompts for ids in (one["prompt_ids"], *one["response_ids"])):
            digest.update(_key(ids) + b"/")
        self.shape = (self.starts[-1], hidden_size)
        settings = settings | {"tokens": digest.hexdigest(), "shape": self.shape, "chunks": len(self.chunks)}
        self.settings = json.loads(json.dumps(settings))

    @contextlib.contextmanager
    def open(self, context: DistributedContext) -> Iterator[None]:
        """Hold the folder, made if need be. Collective.

        Raises:
            InputError: it holds states of other data or another model, or damaged ones, or another run is writing.
            RunError: the disk has no room for the states.
        """
        claim = context.main_process_first(self._claim, main_only=True)
        with claim or contextlib.nullcontext():
            self.states = np.load(self.folder / _STATES, mmap_mode="r+")
            self.done = np.load(self.folder / _DONE, mmap_mode="r+")
            yield

    def _claim(self):
        claim, path = lock_folder(self.folder, "features"), self.folder / _SETTINGS
        found = read_object(path)
        if found and found != self.settings:
            name = next(name for name in (*self.settings, *found) if found.get(name) != self.settings.get(name))
            values = f"{name} {found.get(name)}, now {self.settings.get(name)}"
            what = {"tokens": "of other comparisons, or of these with other cuts", "model_files": "of another model"}
            what = what.get(name, f"made with {values}")
            raise InputError(f"{self.folder} holds hidden states {what}: choose another folder")
        for name, dtype, shape in (_STATES, np.float32, self.shape), (_DONE, np.bool_, (len(self.chunks),)):
            file = self.folder / name
            if found:  # settings come last, so with them all is there
                _check_array(file, shape)
                continue
            with writing(file):
                array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
                size = file.stat().st_size
                del array
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    with file.open("r+b") as opened:
                        os.posix_fallocate(opened.fileno(), 0, size)  # a full disk would end a write with SIGBUS
        if not found:
            replace_text(path, json.dumps(self.settings, indent=2))
        return claim

    def fill(self, context: DistributedContext, load: Callable[[], FrozenBackbone], batch_tokens: int | None) -> int:
        """Compute what is missing, split over the processes; the backbone is loaded only then. Collective.

        Returns the number of prompts that were computed, by all processes together.
        """
        missing = context.broadcast(np.flatnonzero(~self.done).tolist())
        if not missing:
            return 0
        model = context.main_process_first(load)
        mine = missing[context.rank :: context.world_size]
        shown = context.is_main
        with tqdm(total=len(mine), desc="hidden states", unit="chunk", disable=not shown, mininterval=1) as bar:
            for chunk in mine:
                numbers = self.chunks[chunk]
                rows = [_as_lists(self.prompts[number]) for number in numbers]
                for position, found in embed(model, rows, batch_tokens=batch_tokens):
                    start, stop = self.starts[numbers[position] : numbers[position] + 2]
                    self.states[start] = found.prompt_hidden_state.float().numpy()
                    self.states[start + 1 : stop] = found.embeddings.numpy()
                self.states.flush()  # on disk before it counts as done
                self.done[chunk] = True
                self.done.flush()
                bar.update()
        context.barrier()
        return sum(len(self.chunks[chunk]) for chunk in missing)


def _check_array(file: Path, shape: tuple[int, ...]) -> None:
    try:
        intact = np.load(file, mmap_mode="r").shape == shape  # "r+" would lengthen a file that was cut, with zeros
    except (OSError, ValueError):
        intact = False
    if not intact:
        raise InputError(f"{file} is missing or damaged: remove {file.parent}, or choose another folder")


def _as_lists(prompt: dict) -> dict:
    ids = {
        "prompt_ids": prompt["prompt_ids"].tolist(),
        "response_ids": [one.tolist() for one in prompt["response_ids"]],
    }
    return prompt | ids


def _chunks(prompts: list[dict]) -> list[list[int]]:
    """Indices of prompts of similar length, the longest first, each list of about `CHUNK_TOKENS` tokens."""
    tokens = [len(prompt["prompt_ids"]) + sum(map(len, prompt["response_ids"])) for prompt in prompts]
    chunks, room = [], 0
    for index in sorted(range(len(prompts)), key=lambda index: (-tokens[index], index)):
        if room < tokens[index]:
            chunks.append([])
            room = CHUNK_TOKENS
        chunks[-1].append(index)
        room -= tokens[index]
    return chunks


@dataclass
class StateBatch:
    """Preferences among states, with the fields that `trainer.objectives.batch_loss` reads of a `PreferenceBatch`.

    responses: (N,), prompts: (G,) rows of `states.npy`. owner: (N,) index of each response's prompt.
    """

    responses: np.ndarray
    prompts: np.ndarray
    owner: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    comparison_index: torch.Tensor
    label: torch.Tensor
    margin: torch.Tensor
    weight: torch.Tensor
    targets: None = None


def collate_states(rows: list[Placed], weights: list[float], device) -> StateBatch:
    """A batch of comparisons, its tensors on `device`; no state is read."""
    terms = preference_terms([row.terms(weight) for row, weight in zip(rows, weights, strict=True)])
    responses = np.array([place for row in rows for place in row.responses])
    terms["owner"] = torch.tensor([number for number, row in enumerate(rows) for _ in row.responses])
    terms = {name: tensor.to(device) for name, tensor in terms.items()}
    return StateBatch(responses, np.array([row.prompt for row in rows]), **terms)
