#!/usr/bin/env bash
# Train one preference model on this machine: all its GPUs, or its CPU.
#
#   bash scripts/run_train_rm_general_preference_single.sh                      tiny model on the bundled comparisons
#   bash scripts/run_train_rm_general_preference_single.sh --preference_head bt        the same as Bradley-Terry
#   PRETRAIN=google/gemma-2b-it DATASET=my.jsonl bash scripts/run_train_rm_general_preference_single.sh \
#       --value_head_dim 6 --add_prompt_head                                    a real one
#
# Settings: PRETRAIN, DATASET, EVAL_DATASET, SAVE_PATH, NPROC, MICRO_BATCH, GLOBAL_BATCH; RESTARTS=3 continues up to
# three times from the newest checkpoint (--save_steps) when a process dies. Any flag of train_rm_general_preference.py
# may follow and wins.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ALSO_NEEDED=deepspeed
source "$HERE/environment.sh"
PROCESSES=$NPROC
source "$HERE/training_settings.sh"
exec "${LAUNCH[@]}" "${TRAIN[@]}"
