"""How far an iteration of alignment has come, from the embeddings of all policies' responses to held-out prompts.

Of N prompts, T policies (the first the start, the last the current one) and M responses to a prompt, the margin of
response i over j is P_ij - 1/2, of policy a over b the mean over their responses. Every mean counts prompts alike.
`preference_report` puts the functions together; `policies.make_contests` makes its `Contest`s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import optimize, stats
from torch import Tensor

from general_preference.inference.ranking import hodge, nash
from general_preference.models.score import plane_scores, preference_matrix

RESAMPLES, SEED = 10_000, 0
LENGTH_BINS = 5
_RIDGE = 1e-6  # keeps the fit of outcomes that lengths separate finite


@dataclass(frozen=True)
class Contest:
    """The M responses of all policies to one prompt, and a preference model's view of them.

    embeddings: (M, D). gate: (P,) or None. temperature: tau. owner: (M,) number of the policy. lengths: (M,) tokens.
    """

    embeddings: Tensor
    gate: Tensor | None
    temperature: float
    owner: Tensor
    lengths: Tensor

    def logits(self) -> Tensor:
        """(M, M) score / tau in float64, exactly antisymmetric."""
        return preference_matrix(self.embeddings.double(), self.gate) / self.temperature

    def margins(self) -> Tensor:
        """(M, M) P(row is preferred to column) - 1/2."""
        return torch.tanh(self.logits() / 2) / 2

    def averages(self, policies: int) -> Tensor:
        """(T, M) weights that average over each policy's responses."""
        member = torch.nn.functional.one_hot(self.owner, policies).T.double()
        return member / member.sum(dim=1, keepdim=True)


def policy_margins(contest: Contest, policies: int) -> Tensor:
    """(T, T) mean P(row's response is preferred to column's) - 1/2, exactly antisymmetric."""
    averages = contest.averages(policies)
    means = averages @ contest.margins() @ averages.T
    return (means - means.T) / 2


def mean_interval(values: Tensor) -> list[dict[str, float | None]]:
    """{win_rate, low, high} of each column of (N, C) values: mean and 95 % percentile bootstrap over N prompts.

    One prompt alone has no interval: None. Source: Efron 1979.
    """
    low = high = [None] * values.shape[1]
    if len(values) > 1:
        options = {
            "n_resamples": RESAMPLES,
            "method": "percentile",
            "random_state": SEED,
            "batch": 200,
            "vectorized": True,
        }
        means = stats.bootstrap((values.numpy(),), lambda drawn, axis: drawn.mean(axis=axis), axis=0, **options)
        low, high = means.confidence_interval.low.tolist(), means.confidence_interval.high.tolist()
    rows = zip(values.mean(dim=0).tolist(), low, high, strict=True)
    return [dict(zip(("win_rate", "low", "high"), row, strict=True)) for row in rows]


def policy_exploitability(margins: Tensor, mixtures: Tensor) -> Tensor:
    """(X,) how far the best of T policies beats each mixture of them: max_a sum_b margins_ab w_b, which is >= 0.

    margins: (T, T), antisymmetric. mixtures: (X, T), rows that sum to 1.
    """
    return (mixtures @ margins.T).max(dim=1).values


def response_exploitability(contest: Contest, mixtures: Tensor) -> Tensor:
    """(X,) how far the best of all M responses beats the responses of each mixture of policies, on average over them.

    The best is found on the very responses that it beats, so the number is too large by chance where they are few:
    compare it between policies, and with mixtures, which have more responses, with care.
    """
    weights = mixtures @ contest.averages(mixtures.shape[1])
    return (weights @ contest.margins().T).max(dim=1).values


def policy_cyclic_share(margins: Tensor, prompts: int) -> float:
    """What no ranking of policies can explain: `hodge` on the logits of their mean win rates (T, T).

    Win rates are cut to [1 / 2N, 1 - 1 / 2N]: N prompts do not tell a rarer defeat from none. Policies between which
    all win rates are cut have logits of one size, and a chain of three of them a share of 1/9.
    """
    least = 0.5 / prompts
    logits = torch.logit((margins + 0.5).clamp(least, 1 - least))
    return hodge((logits - logits.T) / 2).cyclic_share


def length_controlled(difference: Tensor, wins: Tensor, weights: Tensor) -> dict[str, float | None]:
    """The win rate at equal length: sigmoid(a) of P(win) = sigmoid(a + b tanh(difference / rms)).

    a, b: of maximal likelihood; outcomes may be fractions. rms: root of the mean squared difference. Where hardly any
    pair is about equally long, sigmoid(a) is extrapolated (see `length_bins`); where all pairs differ by the same
    number of tokens, nothing tells a from b: None. Source: the length term of AlpacaEval 2 (Dubois et al. 2024, arXiv
    2404.04475), without its terms for single instructions, and with rms for the standard deviation, since a policy
    that is always longer would lie where the tanh is flat.

    Args:
        difference: (B,) tokens of the first response minus those of the second. wins: (B,) P(first is preferred).
        weights: (B,), with sum 1.

    Returns:
        controlled_win_rate; slope (b), positive where longer responses win.
    """
    if difference.min() == difference.max():
        same = (weights * wins).sum().item() if not difference.any() else None
        return {"controlled_win_rate": same, "slope": None}
    rms = (weights * difference.square()).sum().sqrt()
    inputs = torch.stack([torch.ones_like(wins), torch.tanh(difference / rms)], dim=1)

    def loss(ab: Sequence[float]) -> tuple[float, Sequence[float]]:
        logits = inputs @ torch.as_tensor(ab)
        each = torch.nn.functional.softplus(logits) - wins * logits
        slope = inputs.T @ (weights * (torch.sigmoid(logits) - wins))
        return (weights @ each).item() + _RIDGE / 2 * float(ab @ ab), slope.numpy() + _RIDGE * ab

    def curvature(ab: Sequence[float]):
        chance = torch.sigmoid(inputs @ torch.as_tensor(ab))
        return (inputs.T @ (inputs * (weights * chance * (1 - chance))[:, None]) + _RIDGE * torch.eye(2)).numpy()

    fit = optimize.minimize(loss, [0.0, 0.0], jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-10})
    a, b = fit.x.tolist()
    return {"controlled_win_rate": 1 / (1 + math.exp(-a)), "slope": b}


def length_bins(difference: Tensor, wins: Tensor, weights: Tensor, bins: int = LENGTH_BINS) -> list[dict]:
    """Win rate where the first response is shorter, about as long, longer: {low, high, share, win_rate} of each bin.

    Bins hold about as many pairs each, those of equal difference together; low and high are in tokens, both included.
    Arguments as of `length_controlled`.
    """
    steps = torch.linspace(0, 1, bins + 1, dtype=difference.dtype)[1:-1]
    edges = torch.quantile(difference, steps, interpolation="nearest").unique()
    index, found = torch.bucketize(difference, edges), []
    for number in index.unique():
        inside = index == number
        own, share = difference[inside], weights[inside].sum().item()
        win_rate = (weights * wins)[inside].sum().item() / share
        row = {"low": int(own.min()), "high": int(own.max()), "share": share, "win_rate": win_rate}
        found.append(row)
    return found


def score_parts(contest: Contest, first: int, second: int) -> Tensor:
    """(K1, K2, P or P + 1) what each plane, and an odd D's scalar as the last, adds to policies' logits."""
    one, other = (contest.embeddings[contest.owner == policy].double() for policy in (first, second))
    parts = plane_scores(one[:, None], other[None], contest.gate)
    if contest.embeddings.shape[1] % 2:
        parts = torch.cat([parts, one[:, None, -1:] - other[None, :, -1:]], dim=-1)
    return parts / contest.temperature


def best_of_n(logits: Tensor, margins: Tensor, n: int) -> float:
    """Margin of the best of n over the others of K > n samples, without bias: the others are fresh.

    The best is the one of highest mean score among its n. Mean over the K ways to take n samples in a row.

    logits, margins: (K, K), antisymmetric.
    """
    count = len(logits)
    order = (torch.arange(count)[:, None] + torch.arange(count)) % count  # (K, K): the k-th way starts at sample k
    chosen, fresh = order[:, :n], order[:, n:]
    best = logits[chosen[:, :, None], chosen[:, None, :]].mean(dim=2).argmax(dim=1)
    winner = chosen.gather(1, best[:, None])
    return margins[winner, fresh].mean().item()


def preference_report(contests: Sequence[Contest], names: Sequence[str]) -> dict:
    """Everything about T >= 2 policies by one preference model, fit for JSON. The names are in the order of `owner`.

    Returns:
        win_rate:      of the current policy against start, previous, and mixture (all policies alike, itself
                       included), each {win_rate, low, high}, see `mean_interval`
        against_start: {policy: {win_rate, low, high}}
        matrix:        (T, T) mean win rates of row against column
        nash:          {policy: weight} of the mixture of policies that none of them beats
        cyclic_share:  see `policy_cyclic_share`
        exploitability: {policies, responses}, each {start, last, mixture, nash, and every policy under `each`}: by how
                       much the best policy, or the best of all sampled responses to a prompt, beats it
        length:        current against start: controlled_win_rate, slope, bins
        planes:        [{name, contribution, start_share, share}]: mean part of the logit of current over start; the
                       plane's share of the mean squared parts among a policy's own samples, at the start and now
        best_of_n:     [{n, kl_bound, win_rate, low, high}] of the start against itself for n = 1, 2, 4, .. < K; the
                       best of n is within log n - (n - 1) / n of the start in KL divergence
    """
    count, last = len(names), len(names) - 1
    each = torch.stack([policy_margins(contest, count) for contest in contests])  # (N, T, T)
    margins = each.mean(dim=0)
    weights = nash(margins + 0.5).abs()  # without a zero's sign
    uniform = torch.full((count,), 1 / count, dtype=torch.float64)
    mixtures = torch.cat([torch.eye(count, dtype=torch.float64), uniform[None], weights[None]])
    against = each[:, last] @ mixtures[[0, last - 1, count]].T
    rates = mean_interval(torch.cat([against, each[:, :, 0]], dim=1) + 0.5)
    by_responses = torch.stack([response_exploitability(one, mixtures) for one in contests]).mean(dim=0)
    pairs = _pairs(contests, last)
    return {
        "win_rate": dict(zip(("start", "previous", "mixture"), rates, strict=False)),
        "against_start": dict(zip(names, rates[3:], strict=True)),
        "matrix": (margins + 0.5).tolist(),
        "nash": dict(zip(names, weights.tolist(), strict=True)),
        "cyclic_share": policy_cyclic_share(margins, len(contests)),
        "exploitability": {
            "policies": _named(names, policy_exploitability(margins, mixtures)),
            "responses": _named(names, by_responses),
        },
        "length": length_controlled(*pairs) | {"bins": length_bins(*pairs)},
        "planes": _planes(contests, last),
        "best_of_n": _best_of_start(contests),
    }


def _named(names: Sequence[str], values: Tensor) -> dict:
    *policies, mixture, equilibrium = values.tolist()
    found = {"start": policies[0], "last": policies[-1], "mixture": mixture, "nash": equilibrium}
    return found | {"each": dict(zip(names, policies, strict=True))}


def _pairs(contests: Sequence[Contest], last: int) -> tuple[Tensor, Tensor, Tensor]:
    """(difference of tokens, P(preferred), weight) of all responses of the current policy against all of the start."""
    columns = []
    for contest in contests:
        first, second = contest.owner == last, contest.owner == 0
        wins = contest.margins()[first][:, second].flatten() + 0.5
        lengths = contest.lengths.double()
        difference = (lengths[first][:, None] - lengths[second]).flatten()
        columns.append((difference, wins, torch.full_like(wins, 1 / len(wins) / len(contests))))
    difference, wins, weights = (torch.cat(column) for column in zip(*columns, strict=True))
    return difference, wins, weights


def _planes(contests: Sequence[Contest], last: int) -> list[dict]:
    dim = contests[0].embeddings.shape[1]
    names = [f"plane {number + 1}" for number in range(dim // 2)] + ["scalar"] * (dim % 2)
    means = torch.stack([score_parts(one, last, 0).mean(dim=(0, 1)) for one in contests]).mean(dim=0).tolist()
    shares = []
    for policy in (0, last):
        squares = [score_parts(one, policy, policy).square().mean(dim=(0, 1)) for one in contests]
        square = torch.stack(squares).mean(dim=0)
        total = square.sum()
        shares.append((square / total).tolist() if total > 0 else [None] * len(names))
    rows = zip(names, means, *shares, strict=True)
    return [dict(zip(("name", "contribution", "start_share", "share"), row, strict=True)) for row in rows]


def _best_of_start(contests: Sequence[Contest]) -> list[dict]:
    least = min(int((one.owner == 0).sum()) for one in contests)
    sizes = [2**power for power in range(least.bit_length()) if 2**power < least]
    columns = []
    for contest in contests:
        own = contest.owner == 0
        logits, margins = (matrix[own][:, own] for matrix in (contest.logits(), contest.margins()))
        columns.append([best_of_n(logits, margins, n) for n in sizes])
    rates = mean_interval(torch.tensor(columns, dtype=torch.float64) + 0.5)
    return [{"n": n, "kl_bound": math.log(n) - (n - 1) / n} | rate for n, rate in zip(sizes, rates, strict=True)]
