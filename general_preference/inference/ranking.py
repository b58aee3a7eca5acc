"""From a preference matrix to one number per response, rankings and cycles. Called by `GPMPipeline` and evaluation/.

Row i, column j of a (K, K) matrix is P(i is preferred to j); P + P^T = 1. Cyclic preferences have no consistent
ranking, only ways to choose one; each function says which.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from general_preference.errors import InputError
from general_preference.models.score import simple_cycles

SCORE_METHODS = ("borda", "copeland", "nash", "min")  # of `response_scores`
_TOLERANCE = 1e-6  # what fp32 scores leave uncertain about a probability

Matrix = torch.Tensor | Sequence[Sequence[float]]
Number = float | Fraction


@dataclass
class HodgeSplit:
    """A score matrix as the sum of a transitive and a cyclic part, which are orthogonal.

    potential:        (K,) the numbers whose differences fit the scores best, with mean 0
    transitive:       (K, K) their differences
    cyclic:           (K, K) what no numbers can explain; every row sums to 0
    transitive_share, cyclic_share: parts of the squared scores, together 1; all ties count as transitive
    """

    potential: torch.Tensor
    transitive: torch.Tensor
    cyclic: torch.Tensor
    transitive_share: float
    cyclic_share: float


def borda(probabilities: Matrix) -> torch.Tensor:
    """(K,) mean probability of winning against the others, in [0, 1]; 0.5 for a single response.

    Equal for all members of a symmetric cycle. Source: de Borda (1781); Heckel et al. 2019 (arXiv 1606.08842).
    """
    matrix = _checked(probabilities)
    if len(matrix) == 1:
        return torch.full((1,), 0.5, dtype=matrix.dtype)
    return (matrix.sum(dim=1) - matrix.diagonal()) / (len(matrix) - 1)


def copeland(probabilities: Matrix) -> torch.Tensor:
    """(K,) share of the others that a response beats with P > 0.5, a tie counting one half; 0.5 for a single response.

    Source: Copeland (1951); Saari and Merlin 1996 ("The Copeland method").
    """
    matrix = _checked(probabilities)
    return borda((torch.sign(matrix - 0.5).fill_diagonal_(0) + 1) / 2)


def nash(probabilities: Matrix) -> torch.Tensor:
    """(K,) weights of the von Neumann winner: the mixed strategy that no response beats more often than not.

    It maximizes min_j sum_i w_i (P_ij - 1/2), 0 at the optimum. A response that beats all others gets weight 1; the
    members of a cycle share it. Of several optima the mean over those that favor each response most, so that ties
    get equal weights. Differences from 1/2 below 1e-6 are ties. Needs scipy. Source: Fishburn 1984 (maximal lotteries);
    Dudik et al. 2015 (arXiv 1502.06362); for language models, Munos et al. 2024 (arXiv 2312.00886).

    Raises:
        InputError: not a preference matrix. RuntimeError: the linear program found no solution.
    """
    matrix = _checked(probabilities)
    payoff = (matrix - matrix.T) / 2
    payoff[payoff.abs() < _TOLERANCE] = 0.0
    count, stake = len(payoff), payoff.abs().max().item()
    if stake == 0:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    payoff /= stake
    # The optimum is a single point where the largest and the smallest value of any direction agree.
    direction = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [_optimal_strategy(payoff, sign * direction) for sign in (1, -1)]
    if (ends[0] - ends[1]).abs().max() < _TOLERANCE:
        return ends[0]
    strategies = torch.stack([_optimal_strategy(payoff, favored) for favored in torch.eye(count, dtype=torch.float64)])
    return strategies[strategies.diagonal() > _TOLERANCE].mean(dim=0)


def _optimal_strategy(payoff: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Of the strategies that every opponent at best ties with, the one that goes farthest in `direction`. (K,)"""
    from scipy.optimize import linprog  # only here: scoring needs no scipy

    count = len(payoff)
    found = linprog(-direction, A_ub=-payoff.T, b_ub=[0.0] * count, A_eq=[[1.0] * count], b_eq=[1.0])
    if found.status != 0:
        raise RuntimeError(f"no mixed strategy found for this preference matrix: {found.message}")
    weights = torch.from_numpy(found.x).clamp(min=0)
    return weights / weights.sum()


METHODS: dict[str, Callable[[Matrix], torch.Tensor]] = {"borda": borda, "copeland": copeland, "nash": nash}


def rank(probabilities: Matrix, method: str = "borda") -> list[int]:
    """Response indices, best first; `borda` breaks the ties of `copeland` and `nash`, the order given what is left.

    Raises:
        InputError: unknown method, or not a preference matrix.
    """
    if method not in METHODS:
        raise InputError(f"unknown ranking method {method!r}: choose {', '.join(METHODS)}")
    columns = METHODS[method](probabilities).tolist(), borda(probabilities).tolist()
    merits = [(round(value, 6), round(second, 6)) for value, second in zip(*columns, strict=True)]
    return sorted(range(len(merits)), key=merits.__getitem__, reverse=True)


def response_scores(scores: Matrix, method: str = "borda", temperature: float = 1.0) -> list[Number]:
    """One number per response from the scores between them; exact, so that ties stay ties. The best has the largest.

    Args:
        scores: (K, K) antisymmetric, row over column. temperature: tau of P = sigmoid(score / tau), read by "nash".
        method:
            borda     mean score against all K responses (itself counts 0), the reward that fits the scores best (see
                      `hodge`); for a Bradley-Terry model's scores r_i - r_j, r_i minus the mean reward
            copeland  share of the others that it beats, a tie counting one half
            nash      weight in the von Neumann winner (see `nash`), to six digits
            min       its lowest score against another

    Raises:
        InputError: unknown method, or not a square matrix of finite numbers.
    """
    matrix = _square(scores)
    rows, others = matrix.tolist(), max(len(matrix) - 1, 1)
    if method == "borda":
        return [sum(map(Fraction, row)) / len(rows) for row in rows]
    if method == "copeland":
        return [Fraction(sum(2 if score > 0 else int(score == 0) for score in row) - 1, 2 * others) for row in rows]
    if method == "nash":
        return [round(weight, 6) for weight in nash(torch.sigmoid(matrix / temperature)).tolist()]
    if method == "min":
        return [min([score for j, score in enumerate(row) if j != i], default=0.0) for i, row in enumerate(rows)]
    raise InputError(f"unknown method {method!r}: choose {', '.join(SCORE_METHODS)}")


def hodge(scores: Matrix) -> HodgeSplit:
    """Split a score matrix (K, K) into its transitive part and the cyclic rest; the potential is the row mean.

    Source: Jiang, Lim, Yao, Ye 2011 (HodgeRank, arXiv 0811.1067), for a complete graph with equal weights.

    Raises:
        InputError: not a square antisymmetric matrix.
    """
    matrix = _square(scores)
    if (matrix + matrix.T).abs().max() > _TOLERANCE * max(1.0, matrix.abs().max().item()):
        raise InputError("scores are not antisymmetric: expected score[i][j] = -score[j][i]")
    potential = matrix.mean(dim=1)
    transitive = potential[:, None] - potential[None, :]
    cyclic = matrix - transitive
    total = matrix.square().sum().item()
    share = min(1.0, cyclic.square().sum().item() / total) if total > 0 else 0.0
    return HodgeSplit(potential, transitive, cyclic, 1.0 - share, share)


def cycles(probabilities: Matrix, longest: int = 3) -> list[list[int]]:
    """Cycles of the relation P > 0.5, the most decided first (by the smallest probability along the cycle).

    Each is a list of response indices from the smallest on, each preferred to the next and the last to the first.
    `longest` is the length of the longest one searched for, in K ** longest steps; without ties there is a cycle of
    three wherever there is any (Moon 1968, "Topics on Tournaments").
    """
    matrix = _checked(probabilities)
    if longest < 3:
        raise InputError(f"a cycle has at least 3 members, not {longest}")
    found = sorted(simple_cycles((matrix > 0.5).nonzero().tolist(), longest))
    return sorted(found, key=lambda one: min(matrix[one, one[1:] + one[:1]].tolist()), reverse=True)


def _checked(probabilities: Matrix) -> torch.Tensor:
    matrix = _square(probabilities)
    if matrix.min() < -_TOLERANCE or matrix.max() > 1 + _TOLERANCE:
        raise InputError("a preference matrix holds probabilities from 0 to 1")
    if (matrix + matrix.T - 1).abs().max() > _TOLERANCE:
        raise InputError("not a preference matrix: expected P[i][j] + P[j][i] = 1")
    return matrix


def _square(values: Matrix) -> torch.Tensor:
    """A finite square matrix with at least one row, in float64 on the CPU."""
    try:
        matrix = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"not a matrix of numbers: {error}") from error
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) == 0:
        raise InputError(f"expected a square matrix with at least one row, found shape {tuple(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise InputError("the matrix holds values that are not finite")
    return matrix
