"""What is minimized and measured: the loss of a micro-batch, its statistics, and which flags a run cannot change.

The loop (trainer.py) knows none of this. Another objective is another class with the methods of `Objective`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from general_preference.datasets.packing import Batch, Collator, PreferenceBatch
from general_preference.models.attention import RowLayout
from general_preference.models.losses import balance_coefficient, preference_loss, regularizer
from general_preference.models.reward_model import RewardModel
from general_preference.models.score import preference_score
from general_preference.models.statistics import preference_statistics, preference_sums
from general_preference.plots import EmbeddedCycle, draw_cycles, embedded_cycle
from general_preference.trainer.arguments import LossArguments

Output = dict[str, torch.Tensor]  # of the model's forward


@dataclass
class BatchLoss:
    """Losses of one micro-batch.

    total: scalar, what is backpropagated. each: (M,) terms before weighting, to name what is not finite.
    sums: (S,) float64 statistics that add up over micro-batches and processes.
    """

    total: torch.Tensor
    each: torch.Tensor
    sums: torch.Tensor


class Objective(Protocol):
    """What the loop asks of an objective.

    layout, collate: how rows lie, and what makes them in training. collate_evaluation: the same for evaluation.
    loss: of a micro-batch, from the model's output.
    metrics: {name: value} of a log line, from the added-up `BatchLoss.sums` of so many micro-batches.
    begin_evaluation: set `name` is about to be evaluated: forget what was kept of it.
    evaluation_sums: (E,) float64 statistics of a micro-batch of an evaluation set, which add up.
    statistics: what people read of added-up `evaluation_sums`; has the keys `loss` and `n`.
    identity: (what a continued run must share with this one, what it may change, which is then logged).
    draw: save pictures of the last evaluation.
    """

    layout: RowLayout
    collate: Collator
    collate_evaluation: Collator

    def loss(self, output: Output, batch: Batch) -> BatchLoss: ...
    def metrics(self, sums: torch.Tensor, micro_batches: int) -> dict[str, float]: ...
    def begin_evaluation(self, name: str) -> None: ...
    def evaluation_sums(self, name: str, output: Output, batch: Batch) -> torch.Tensor: ...
    def statistics(self, sums: torch.Tensor) -> dict[str, float]: ...
    def identity(self) -> tuple[dict, dict]: ...
    def draw(self, folder: Path) -> None: ...


@dataclass
class PreferenceLosses:
    """Losses of one micro-batch, per preference (M,): score, preference loss, regularizer or None; and their total.

    total: scalar, the weighted sum that is backpropagated. temperature: (1,). aux: scalar, the load-balancing loss
    times the micro-batch's share of the step, or None.
    """

    score: torch.Tensor
    preference: torch.Tensor
    regularizer: torch.Tensor | None
    total: torch.Tensor
    temperature: torch.Tensor
    aux: torch.Tensor | None = None


def batch_loss(
    output: Output, batch: PreferenceBatch, arguments: LossArguments, aux_loss_coef=None
) -> PreferenceLosses:
    """(1 - c) * preference + c * regularizer + a * load balance of a micro-batch, from the model's output.

    Without the regularizer c = 0. Weights are the batch's own, so any split into micro-batches gives one gradient. Only
    the load-balancing loss (its weight a is `aux_loss_coef`, default what `arguments` say) depends on the split: it is
    that of a micro-batch's tokens, averaged over micro-batches weighted by comparisons, as in transformers' trainer.
    """
    embeddings, gates = output["embeddings"], output.get("gates")
    gate = None if gates is None else gates[batch.comparison_index]
    score = preference_score(embeddings[batch.first], embeddings[batch.second], gate)
    preference = preference_loss(
        score,
        kind=arguments.loss,
        temperature=output["temperature"],
        margin=batch.margin if arguments.margin_loss else 0.0,
        target=arguments.regression_target_margin,
        label=batch.label,
    )
    each, extra = preference, None
    if batch.targets is not None:
        extra = _regularizer(output, batch, arguments)
        each = (1 - arguments.ptx_loss_coef) * preference + arguments.ptx_loss_coef * extra
    total, aux = (batch.weight * each).sum(), None
    if "aux_loss" in output:
        aux = batch.weight.sum() * output["aux_loss"]  # 1 * aux_loss, except in the last step of an epoch
        total = total + (arguments.aux_loss_coef if aux_loss_coef is None else aux_loss_coef) * aux
    return PreferenceLosses(score, preference, extra, total, output["temperature"], aux)


def _regularizer(output: Output, batch: PreferenceBatch, arguments: LossArguments) -> torch.Tensor:
    log_probs, counts = output["log_probs"], output["counts"]

    def sequence(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if arguments.ptx_response_only:
            return log_probs[index], counts[index]
        prompts = len(batch.response_ends) + batch.comparison_index
        return log_probs[index] + log_probs[prompts], counts[index] + counts[prompts]

    return regularizer(
        sequence(batch.first),
        sequence(batch.second) if arguments.ptx_loss == "reference_free" else None,
        kind=arguments.ptx_loss,
        beta=arguments.reward_scaler_beta,
        margin=arguments.reward_margin,
    )


class PreferenceObjective:
    """`batch_loss`, for Bradley-Terry, GPM and hybrid heads."""

    def __init__(self, arguments: LossArguments, model: RewardModel, tokenizer, device: torch.device):
        """Lay out rows for the kernel that `model` will train with on `device`."""
        self.arguments, self.preference, self.tokenizer = arguments, model.preference, tokenizer
        self.aux_loss_coef = balance_coefficient(model.language_model, arguments.aux_loss_coef)
        self.layout = model.train().layout_on(device)  # the engine will move the model there
        self.cycles: dict[str, EmbeddedCycle] = {}  # of the last evaluation, by set
        self._temperature: torch.Tensor | None = None
        regularized = ""
        if arguments.add_pretrain_loss:
            regularized = "both" if arguments.ptx_loss == "reference_free" else "chosen"
        # Padding is 0 whatever the tokenizer's: a pad token may be one that the model has no embedding for.
        self.collate = Collator(0, self.layout, regularized, self.aux_loss_coef > 0)
        self.collate_evaluation = Collator(0, self.layout)

    def loss(self, output: Output, batch: PreferenceBatch) -> BatchLoss:
        """Losses of a micro-batch; `sums` are those of `statistics.preference_sums`, then regularizer and balance."""
        losses = batch_loss(output, batch, self.arguments, self.aux_loss_coef)
        self._temperature = losses.temperature.detach()
        each, own = losses.preference.detach(), torch.zeros(2, dtype=torch.float64, device=losses.total.device)
        if losses.regularizer is not None:
            each = each + losses.regularizer.detach()
            own[0] = (batch.weight * losses.regularizer.detach()).sum()
        if losses.aux is not None:
            own[1] = losses.aux.detach()
        return BatchLoss(losses.total, each, torch.cat([_sums(losses, batch), own]))

    def metrics(self, sums: torch.Tensor, micro_batches: int) -> dict[str, float]:
        """Accuracy, ties, probability and margin of a log line, and the parts of the loss if it has several."""
        summary = preference_statistics(sums[:-2])
        found = {name: summary[name] for name in ("accuracy", "ties", "probability", "margin")}
        if self.arguments.add_pretrain_loss:
            found |= {"preference_loss": summary["loss"], "regularizer": sums[-2].item() / micro_batches}
        if self.aux_loss_coef:
            found["aux_loss"] = sums[-1].item() / micro_batches
        if self.preference.learnable_temperature:
            found["temperature"] = self._temperature.item()
        return found

    def begin_evaluation(self, name: str) -> None:
        """Forget the set's cycle."""
        self.cycles.pop(name, None)

    def evaluation_sums(self, name: str, output: Output, batch: PreferenceBatch) -> torch.Tensor:
        """Sums of the preference loss without the regularizer; keeps the set's first stated cycle for `draw`."""
        if name not in self.cycles and len(batch.first) > len(batch.ids):  # else all are pairs, which have none
            cycle = embedded_cycle(name, batch, output, self.tokenizer)
            self.cycles |= {name: cycle} if cycle is not None else {}
        return _sums(batch_loss(output, batch, self.arguments), batch)

    def statistics(self, sums: torch.Tensor) -> dict[str, float]:
        """See `statistics.preference_statistics`."""
        return preference_statistics(sums)

    def identity(self) -> tuple[dict, dict]:
        """The head must stay; the loss may change."""
        head = self.preference
        fixed = {
            "preference_head": head.head, "value_head_dim": head.dim, "add_prompt_head": head.prompt_gate,
            "gate": head.gate, "normalize": head.normalize, "general_preference_tau": head.temperature,
            "learnable_temperature": head.learnable_temperature,
        }  # fmt: skip
        return fixed, vars(self.arguments) | {"aux_loss_coef": self.aux_loss_coef}

    def draw(self, folder: Path) -> None:
        """Save `embeddings.png`: held-out cycles as the model sees them."""
        draw_cycles(list(self.cycles.values())[:4], folder / "embeddings.png")


def _sums(losses: PreferenceLosses, batch: PreferenceBatch) -> torch.Tensor:
    return preference_sums(losses.score, batch.label, losses.preference, losses.temperature, batch.weight > 0)
