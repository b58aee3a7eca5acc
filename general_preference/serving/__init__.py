"""Preference models at work: rewards of whole groups for online reinforcement learning, and an HTTP server."""

from general_preference.serving.group_reward import AsyncGroupReward, GroupReward

__all__ = ["AsyncGroupReward", "GroupReward"]
