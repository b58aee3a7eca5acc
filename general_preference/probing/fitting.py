"""Heads trained on kept hidden states: the trainer's own batches, loss, optimizer and schedule, without a backbone."""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from general_preference.datasets.sampler import StepSampler
from general_preference.errors import InputError
from general_preference.models.config import PreferenceConfig
from general_preference.models.heads import SavedHead
from general_preference.models.losses import preference_loss
from general_preference.models.preference_heads import Fp32Linear, PreferenceHeads
from general_preference.models.score import preference_score
from general_preference.models.starting import head_to_train
from general_preference.probing.states import Placed, StateBatch, collate_states
from general_preference.trainer.arguments import LossArguments
from general_preference.trainer.engine import build_schedule, parameter_groups
from general_preference.trainer.objectives import batch_loss
from general_preference.trainer.run_arguments import OptimizerArguments

EVALUATION_ROWS = 512  # comparisons scored at a time
_NAME = re.compile(r"bt(?P<units>_gate(?P<size>\d+))?|(?P<kind>gpm|hybrid)(?P<dim>\d+)(?P<gate>_gate)?(?P<raw>_raw)?")


class GatedReward(nn.Module):
    """A Bradley-Terry reward that reads the prompt, too: w . (sigmoid(G h_prompt) * gelu(V h_response)).

    The scalar rival of a gated GPM: as many weights and as nonlinear, but one number for each response.
    """

    def __init__(self, hidden_size: int, units: int):
        super().__init__()
        self.prompt, self.response = (Fp32Linear(hidden_size, units, bias=False) for _ in range(2))
        self.output = Fp32Linear(units, 1, bias=False)

    def initialize_heads(self, seed: int) -> None:
        """N(0, 1 / inputs), as `PreferenceHeads`."""
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.prompt, self.response, self.output):
            layer.weight.data.normal_(0.0, 1 / math.sqrt(layer.in_features), generator=generator)

    def forward(self, response_states: torch.Tensor, prompt_states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Both (N, hidden), the prompt's state beside each response's; as `HeadsMixin.read_states`, D = 1."""
        features = torch.sigmoid(self.prompt(prompt_states)) * nn.functional.gelu(self.response(response_states))
        return {"embeddings": self.output(features), "temperature": torch.ones(1, device=features.device)}


@dataclass(frozen=True)
class HeadSpec:
    """A head that is compared: of a preference model, or a `GatedReward` of so many units."""

    name: str
    preference: PreferenceConfig | None = None
    units: int = 0

    def make(self, hidden_size: int, seed: int) -> nn.Module:
        """The head with its initial weights."""
        head = GatedReward(hidden_size, self.units) if self.units else PreferenceHeads(self.preference, hidden_size)
        head.initialize_heads(seed)
        return head


def parse_heads(text: str, path: str, saved: SavedHead | None, **asked) -> list[HeadSpec]:
    """`"bt,bt_gate8,gpm4,gpm4_gate,gpm4_gate_raw,hybrid5"` -> heads for the model at `path`.

    gpmD and hybridD have D numbers, _gate a gate on the prompt, and with _raw planes that are not normalized. bt_gateD
    is a `GatedReward` with as many weights as gpmD_gate.

    Args:
        saved: the head that the model has, None for none. asked: further fields of `PreferenceConfig`.

    Raises:
        InputError: an unknown name, a D that the kind does not have, or a name that comes twice.
    """
    specs = []
    for name in (part.strip() for part in text.split(",")):
        found = _NAME.fullmatch(name)
        if found is None:
            raise InputError(f"heads: {name!r} is none of bt, bt_gateD, gpmD, hybridD (then _gate and _raw)")
        if found["units"]:
            size = int(found["size"])
            planes = PreferenceConfig("gpm", size, True).planes
            specs.append(HeadSpec(name, units=max(1, round((size + planes) / 2))))
            continue
        shape = {}
        if found["kind"]:
            shape = {"dim": int(found["dim"]), "prompt_gate": bool(found["gate"]), "normalize": not found["raw"]}
        specs.append(HeadSpec(name, head_to_train(path, saved, found["kind"] or "bt", new=True, **shape, **asked)))
    names = [spec.name for spec in specs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"heads: {twice[0]} is named twice")
    return specs


def read_batch(head: nn.Module, states: np.ndarray, batch: StateBatch) -> dict[str, torch.Tensor]:
    """What `batch_loss` takes as a model's output; only the states of the batch are read."""
    responses, prompts = (
        torch.from_numpy(states[rows]).to(batch.owner.device) for rows in (batch.responses, batch.prompts)
    )
    return head(responses, prompts[batch.owner] if isinstance(head, GatedReward) else prompts)


def training_batches(rows: list[Placed], optimizer: OptimizerArguments, device) -> list[StateBatch]:
    """The steps of a training in the trainer's order, which `optimizer.seed` draws; the same for every head.

    optimizer.micro_train_batch_size is the whole batch of a step.
    """
    sampler = StepSampler([row.length for row in rows], optimizer.micro_train_batch_size, seed=optimizer.seed)
    steps = sampler.micro_batches(optimizer.max_epochs)
    return [
        collate_states([rows[index] for index, _ in step], [weight for _, weight in step], device) for step in steps
    ]


def fit_head(
    spec: HeadSpec, states: np.ndarray, batches: list[StateBatch], optimizer: OptimizerArguments, device
) -> nn.Module:
    """Train a head as the trainer would on a frozen backbone, from the weights that `optimizer.seed` draws."""
    head = spec.make(states.shape[1], optimizer.seed).to(device)
    learned, losses = list(head.parameters()), LossArguments()
    options = {"lr": optimizer.learning_rate, "betas": tuple(optimizer.adam_betas), "weight_decay": optimizer.l2}
    adam = torch.optim.AdamW(parameter_groups(head), **options)
    schedule = build_schedule(adam, optimizer, len(batches))
    for batch in batches:
        adam.zero_grad()
        batch_loss(read_batch(head, states, batch), batch, losses).total.backward()
        if optimizer.max_norm:
            nn.utils.clip_grad_norm_(learned, optimizer.max_norm)
        adam.step()
        schedule.step()
    return head


@dataclass
class Scored:
    """A head on M preferences, on the CPU in float64: scores, losses in nats, and its temperature."""

    score: torch.Tensor
    loss: torch.Tensor
    temperature: float


@torch.no_grad()
def score_rows(head: nn.Module, states: np.ndarray, rows: list[Placed], device) -> Scored:
    """Scores and logistic losses of all preferences, in their order."""
    scores, losses, temperature = [], [], 1.0
    for start in range(0, len(rows), EVALUATION_ROWS):
        part = rows[start : start + EVALUATION_ROWS]
        batch = collate_states(part, [1.0] * len(part), device)
        output = read_batch(head, states, batch)
        gates = output["gates"][batch.comparison_index] if "gates" in output else None
        score = preference_score(output["embeddings"][batch.first], output["embeddings"][batch.second], gates)
        scores.append(score)
        losses.append(preference_loss(score, temperature=output["temperature"], label=batch.label))
        temperature = output["temperature"].item()
    return Scored(torch.cat(scores).cpu().double(), torch.cat(losses).cpu().double(), temperature)
