"""Policies aligned by a preference model: targets, samples, training, and reports.

`targets.policy_target` and `models.losses.policy_loss` are all the mathematics; see docs/alignment.md.
"""
