"""Scored samples -> the table that a policy trains on: targets, and the log-probabilities of the anchors.

Anchors are computed once, by the forward of training, and kept on disk: a run that continues after its weights have
moved reads what they were.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
from tqdm.auto import tqdm

from general_preference.alignment.policy_arguments import PolicyLossArguments
from general_preference.alignment.samples import join, read_samples, read_scores, samples_checksum, summary_path
from general_preference.alignment.targets import best_and_worst, policy_target
from general_preference.datasets.packing import SampleCollator
from general_preference.datasets.sources import INTEGERS, TEXT
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError, NonFiniteError
from general_preference.files import read_object
from general_preference.inference.batch import ASKED, ResultStore
from general_preference.models.config import weights_digest
from general_preference.models.policy import PolicyModel
from general_preference.models.score import preference_matrix

logger = logging.getLogger(__name__)

_NUMBERS = datasets.List(datasets.Value("float32"))
_FEATURES = datasets.Features(
    {"id": TEXT, "prompt_ids": INTEGERS, "response_ids": datasets.List(INTEGERS), "length": datasets.Value("int32")}
    | {"finished": datasets.List(datasets.Value("bool")), "target": _NUMBERS, "anchor": _NUMBERS}
)


def read_scored(samples: list[str], scores: list[str]) -> tuple[list[dict], dict]:
    """(rows of all files, settings of the scores): samples with their embeddings and gates, without scores alone.

    Raises:
        InputError: as `read_samples`, `read_scores` and `join`; or scores of different preference models.
    """
    if not scores:
        return [row for one in samples for row in read_samples(one)], {}
    rows, found = [], []
    for one, scored in zip(samples, scores, strict=True):
        loaded = read_scores(scored)
        rows += join(read_samples(one), loaded)
        found.append(loaded[1]["settings"])
    for name in ("model_files", "head", "dim", "planes", "tau"):
        if len(values := {str(settings.get(name)) for settings in found}) > 1:
            raise InputError(f"the scores are of different preference models: {name} is {' and '.join(sorted(values))}")
    return rows, found[0]


def check_sampler(samples: list[str], policy: str) -> None:
    """InputError if a file of samples was written by another policy than the one at `policy`."""
    digest = weights_digest(policy)
    for path in samples:
        written = read_object(summary_path(Path(path)))["settings"].get("policy_digest")
        if written != digest:
            found = f"{path} holds samples of a policy whose weights have the checksum {written}"
            raise InputError(f"{found}, but those of {policy} have {digest}: sample from it, or set any_policy")


def select_and_target(rows: list[dict], arguments: PolicyLossArguments, temperature: float | None) -> Iterator[dict]:
    """The responses that are trained on, and their targets; `kept` are their places among the prompt's.

    Prompts without a best and a worst response are left out where those are selected. `row` is the place among `rows`.

    Raises:
        InputError: the embeddings do not fit the target.
    """
    options = {"kind": arguments.target, "beta": arguments.beta, "iteration": arguments.iteration}
    options |= {"mix": arguments.dynamic_lambda, "clamp": arguments.clamp_target, "count_self": arguments.count_self}
    for number, row in enumerate(rows):
        kept, places, gate = list(range(len(row["response_ids"]))), None, None
        if not arguments.fine_tunes:
            embeddings = torch.tensor(row["embeddings"])
            gate = None if row["gate"] is None else torch.tensor(row["gate"])
        if arguments.select != "all":
            if (places := best_and_worst(preference_matrix(embeddings, gate))) is None:
                continue
            kept = list(places[: 1 if arguments.select == "best" else 2])
        try:
            if arguments.loss == "likelihood":
                target = torch.zeros(len(row["response_ids"]))
            elif arguments.loss == "logistic":  # of the pair: among two responses alone a cycle could turn their order
                target = torch.zeros(len(embeddings))
                hard = arguments.target == "hard"
                pair = [1.0, 0.0] if hard else policy_target(embeddings[kept], gate, temperature, **options).tolist()
                target[kept] = torch.tensor(pair)
            else:
                target = policy_target(embeddings, gate, temperature, **options)
        except ValueError as error:
            raise InputError(f"{row['id']}: {error}") from error
        if not torch.isfinite(target).all():
            raise NonFiniteError(f"{row['id']} has a target that is not finite: look at its scores")
        chosen = {name: [row[name][place] for place in kept] for name in ("response_ids", "finished")}
        yield {"id": row["id"], "prompt_ids": row["prompt_ids"], **chosen, "target": target[kept].tolist(),
               "row": number, "kept": kept}  # fmt: skip


def policy_table(targeted: list[dict], anchors: dict[str, list], weights: dict[str, float]) -> datasets.Dataset:
    """The table that `SampleCollator` reads.

    targeted: of `select_and_target`. anchors: {name: K log-probabilities of each row}, of the names in `weights`.
    """
    table = []
    for row in targeted:
        number, kept = row["row"], row["kept"]
        anchor = [sum(weight * anchors[name][number][place] for name, weight in weights.items()) for place in kept]
        length = len(row["prompt_ids"]) + sum(map(len, row["response_ids"]))
        own = {name: row[name] for name in row if name not in ("row", "kept")}
        table.append(own | {"anchor": anchor, "length": length})
    return datasets.Dataset.from_list(table, features=_FEATURES)


def check_sizes(rows: list[dict], model: PolicyModel, compared: bool) -> None:
    """InputError for samples that the model cannot read, and single responses where they are to be `compared`."""
    limit, vocabulary = model.learned_positions, model.vocabulary_size
    for row in rows:
        longest = len(row["prompt_ids"]) + max(map(len, row["response_ids"]))
        if limit is not None and longest > limit:
            raise InputError(f"{row['id']} has {longest} tokens, but the policy has {limit} positions")
        if (token := max(max(ids, default=0) for ids in (row["prompt_ids"], *row["response_ids"]))) >= vocabulary:
            raise InputError(f"{row['id']} has the token {token}, but the policy has {vocabulary} embeddings")
        if compared and len(row["response_ids"]) < 2:
            raise InputError(f"{row['id']} has one response and nothing to be compared with: sample at least 2")
        if not all(row["response_ids"]):
            raise InputError(f"{row['id']} has a response without tokens: it has no log-probability")


class AnchorStore:
    """Log-probabilities of samples under a policy, one row for each prompt: {"id", "log_probs": [K], "tokens": [K]}."""

    def __init__(self, output: Path):
        self._store = ResultStore(output)

    def load(self, model_of, path: str, rows: list[dict], dtype: str, context: DistributedContext, device) -> list:
        """Per row its K log-probabilities in nats, read or computed now. Collective.

        Args:
            model_of: loads the `PolicyModel` at `path`, if it is needed. rows: of samples.

        Raises:
            InputError: on every process; the model cannot read the samples.
            NonFiniteError: a log-probability is not finite.
        """
        digest = context.broadcast(weights_digest(path) if context.is_main else None)
        settings = {ASKED: {"policy": path}, "policy_digest": digest}
        settings |= {"samples": samples_checksum(rows), "dtype": dtype}
        store = self._store
        with store.open(context, len(rows), settings, overwrite=True):
            finished = context.broadcast(store.finished() if context.is_main else None)
            wanted = [index for index in range(len(rows)) if index not in finished]
            if wanted:
                model = model_of()
                check_sizes(rows, model, compared=False)
                self._compute(model, rows, wanted[context.rank :: context.world_size], context, device)
            context.barrier()
            if context.is_main:
                store.merge()
                store.finish({"prompts": len(rows)})
            context.barrier()
        return [row["log_probs"] for row in store.rows()]

    @torch.no_grad()
    def _compute(self, model: PolicyModel, rows: list[dict], mine: list[int], context, device) -> None:
        model.to(device).eval()
        collate = SampleCollator(0, model.layout_on(device))
        for index in tqdm(mine, desc="log-probabilities", unit="prompt", disable=not context.is_main, mininterval=1):
            row, count = rows[index], len(rows[index]["response_ids"])
            nothing = {"target": [0.0] * count, "anchor": [0.0] * count}
            batch = collate([row | nothing]).to(device)
            output = model(**batch.model_inputs())
            log_probs = output["log_probs"].double().tolist()
            if not torch.isfinite(output["log_probs"]).all():
                raise NonFiniteError(f"{row['id']} has a log-probability that is not finite: the policy cannot be used")
            self._store.append(
                index, {"id": row["id"], "log_probs": log_probs, "tokens": [int(n) for n in output["counts"].tolist()]}
            )
