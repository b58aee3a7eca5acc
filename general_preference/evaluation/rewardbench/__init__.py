"""RewardBench 1 and 2: data, scoring rules, report, and the hook of the official scripts. Imported by no other room."""

from general_preference.evaluation.rewardbench.hook import RewardBenchPipeline, rewardbench_config

__all__ = ["RewardBenchPipeline", "rewardbench_config"]
