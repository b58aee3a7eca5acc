"""General Preference Model: preference and reward models that can hold cycles (arXiv 2410.02197)."""

from general_preference.inference.pipeline import GPMPipeline, generate_high_dim_result_with_prompt
from general_preference.models.losses import language_model_loss, preference_loss
from general_preference.models.reward_model import RewardModel, get_reward_model
from general_preference.models.score import preference_matrix, preference_probability, preference_score

__all__ = [
    "GPMPipeline", "RewardModel", "generate_high_dim_result_with_prompt", "get_reward_model", "language_model_loss",
    "preference_loss", "preference_matrix", "preference_probability", "preference_score",
]  # fmt: skip
