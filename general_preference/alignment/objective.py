"""The objective of policies: `policy_loss` of log-ratios against targets, for the training loop of reward models."""

from pathlib import Path

import torch

from general_preference.alignment.policy_arguments import PolicyLossArguments
from general_preference.datasets.packing import SampleBatch, SampleCollator
from general_preference.models.losses import balance_coefficient, policy_loss
from general_preference.models.policy import PolicyModel
from general_preference.trainer.objectives import BatchLoss, Output

_SUMS = (
    "n",
    "loss",
    "log_ratio",
    "target",
    "log_ratio2",
    "target2",
    "product",
    "abs_log_ratio",
    "abs_target",
    "length",
)
_SUMS += ("unfinished", "prompts", "tied")


class PolicyObjective:
    """`policy_loss` of samples; see `objectives.Objective`."""

    def __init__(self, arguments: PolicyLossArguments, model: PolicyModel, device: torch.device, identity: dict):
        """identity: more that a continued run must share, such as the checksum of scores."""
        self.arguments, self._identity = arguments, identity
        self.aux_loss_coef = balance_coefficient(model.language_model, arguments.aux_loss_coef)
        self.layout = model.train().layout_on(device)  # the engine will move the model there
        self.collate = SampleCollator(0, self.layout, self.aux_loss_coef > 0)
        self.collate_evaluation = SampleCollator(0, self.layout)

    def loss(self, output: Output, batch: SampleBatch) -> BatchLoss:
        """Loss of a micro-batch: the mean over a prompt's responses, then over prompts."""
        log_ratio = output["log_probs"] - batch.anchor
        each = self._each(log_ratio, output["counts"], batch)
        total = (batch.weight * each).sum()
        if "aux_loss" in output:
            total = total + self.aux_loss_coef * batch.weight.sum() * output["aux_loss"]
        return BatchLoss(total, each.detach(), _sums(each, log_ratio, output["counts"], batch))

    def _each(self, log_ratio: torch.Tensor, counts: torch.Tensor, batch: SampleBatch) -> torch.Tensor:
        asked = self.arguments
        options = {"kind": asked.loss, "length": counts, "gamma": asked.length_normalization}
        options |= {"clip": asked.clip, "beta": asked.beta}
        return policy_loss(log_ratio, batch.target, batch.comparison_index, **options)

    def metrics(self, sums: torch.Tensor, micro_batches: int) -> dict[str, float]:
        """See `statistics`, without the loss, which the loop logs itself."""
        return {name: value for name, value in self.statistics(sums).items() if name not in ("loss", "n")}

    def begin_evaluation(self, name: str) -> None:
        """Nothing is kept of a set."""

    def evaluation_sums(self, name: str, output: Output, batch: SampleBatch) -> torch.Tensor:
        """Sums over the responses of prompts with a weight."""
        log_ratio = output["log_probs"] - batch.anchor
        return _sums(self._each(log_ratio, output["counts"], batch), log_ratio, output["counts"], batch)

    def statistics(self, sums: torch.Tensor) -> dict[str, float]:
        """What people read.

        Returns:
            n:           responses counted
            loss:        mean over them
            kl:          minus the mean log-ratio: an unbiased estimate of KL(anchor || policy), in nats, where the
                         samples are the anchor's own at temperature 1; without anchors the mean -log-probability
            log_ratio_sd, target_mean, target_sd: of log-ratios and targets
            correlation: of log-ratios with targets
            regime:      mean |log-ratio| / mean |target|: far below 1 the loss is never near its minimum, and beta
                         acts as a learning rate
            length, unfinished, tied: mean tokens of a response, share cut off, share of prompts with equal targets
        """
        total = dict(zip(_SUMS, sums.tolist(), strict=True))
        n, prompts = max(total["n"], 1), max(total["prompts"], 1)
        mean = {name: value / n for name, value in total.items()}
        variance = {name: max(mean[f"{name}2"] - mean[name] ** 2, 0.0) for name in ("log_ratio", "target")}
        spread = (variance["log_ratio"] * variance["target"]) ** 0.5
        return {
            "loss": mean["loss"],
            "n": round(total["n"]),
            "kl": -mean["log_ratio"],
            "log_ratio_sd": variance["log_ratio"] ** 0.5,
            "target_mean": mean["target"],
            "target_sd": variance["target"] ** 0.5,
            "correlation": (mean["product"] - mean["log_ratio"] * mean["target"]) / spread if spread > 0 else 0.0,
            "regime": mean["abs_log_ratio"] / mean["abs_target"] if mean["abs_target"] else 0.0,
            "length": mean["length"],
            "unfinished": mean["unfinished"],
            "tied": total["tied"] / prompts,
        }

    def identity(self) -> tuple[dict, dict]:
        """Samples and anchors must stay (they are in the table), and scores; the loss and its targets may change."""
        return dict(self._identity), vars(self.arguments) | {"aux_loss_coef": self.aux_loss_coef}

    def draw(self, folder: Path) -> None:
        """No pictures but the curves of training."""


def _sums(each: torch.Tensor, log_ratio: torch.Tensor, counts: torch.Tensor, batch: SampleBatch) -> torch.Tensor:
    counted = batch.weight > 0
    loss, rho, target, length = (one.detach().double() for one in (each, log_ratio, batch.target, counts))
    columns = (
        torch.ones_like(loss),
        loss,
        rho,
        target,
        rho**2,
        target**2,
        rho * target,
        rho.abs(),
        target.abs(),
        length,
    )
    columns += ((~batch.finished).double(),)
    per_response = torch.where(counted, torch.stack(columns), 0.0).sum(dim=1)
    index, groups = batch.comparison_index, len(batch.prompt_ends)
    empty = torch.zeros(groups, dtype=torch.float64, device=target.device)
    highest, lowest = (empty.scatter_reduce(0, index, target, how, include_self=False) for how in ("amax", "amin"))
    real = torch.zeros(groups, dtype=torch.bool, device=target.device).index_fill(0, index[counted], True)
    return torch.cat([per_response, torch.stack([real.sum(), (real & (highest == lowest)).sum()]).double()])
