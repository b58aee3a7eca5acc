#!/usr/bin/env bash
# Run models on the field's evaluation sets, on all GPUs of this machine or on its CPU.
#   MODEL=checkpoint/rm-8b bash eval/run_preference_benchmarks.sh                              all sets, from the hub
#   MODEL="a b" DATA=copies bash eval/run_preference_benchmarks.sh --sets rm_bench,rmb --markdown
# Settings: MODEL (one or more, by spaces), DATA, OUTPUT_DIR, NPROC. Any flag of run_preference_benchmarks.py may follow.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/environment.sh"

read -ra MODELS <<< "${MODEL:-general-preference/GPM-Gemma-2B}"
exec "${LAUNCH[@]}" "$ROOT/eval/run_preference_benchmarks.py" \
  --model "${MODELS[@]}" \
  ${DATA:+--data "$DATA"} \
  --output_dir "${OUTPUT_DIR:-$ROOT/results}" \
  "$@"
