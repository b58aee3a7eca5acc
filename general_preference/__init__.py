"""General Preference Model: preference and reward models that can hold cycles (arXiv 2410.02197)."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what editors read
    from general_preference.inference.pipeline import GPMPipeline, generate_high_dim_result_with_prompt
    from general_preference.models.losses import language_model_loss, preference_loss
    from general_preference.models.reward_model import RewardModel, get_reward_model
    from general_preference.models.score import preference_matrix, preference_probability, preference_score

__all__ = [
    "GPMPipeline", "RewardModel", "generate_high_dim_result_with_prompt", "get_reward_model", "language_model_loss",
    "preference_loss", "preference_matrix", "preference_probability", "preference_score",
]  # fmt: skip


def __getattr__(name: str):
    """A public name, from its module. Not before it is asked for: scripts that start again import this twice."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = ("models.score", "models.losses", "models.reward_model", "inference.pipeline")
    modules = (importlib.import_module(f"{__name__}.{home}") for home in homes)
    return next(vars(module)[name] for module in modules if name in vars(module))
