#!/usr/bin/env bash
# Run a preference model on RewardBench, on all GPUs of this machine or on its CPU.
#   bash rewardbench_eval/run_rm_rewardbench.sh                          a published model on RewardBench 1, from the hub
#   MODEL=checkpoint/rm-8b bash rewardbench_eval/run_rm_rewardbench.sh --rewardbench_version 2 --dataset my_copy.jsonl
# Settings: MODEL, OUTPUT_DIR, NPROC. Any flag of run_rm_rewardbench.py may follow.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/environment.sh"

exec "${LAUNCH[@]}" "$ROOT/rewardbench_eval/run_rm_rewardbench.py" \
  --model "${MODEL:-general-preference/GPM-Gemma-2B}" \
  --output_dir "${OUTPUT_DIR:-$ROOT/results}" \
  "$@"
