"""The field's evaluation sets: one record, one loader and aggregate per set, one report. Imported by no other room."""

from general_preference.evaluation.rewardbench import RewardBenchPipeline, rewardbench_config

__all__ = ["RewardBenchPipeline", "rewardbench_config"]
