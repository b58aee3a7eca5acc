#!/usr/bin/env bash
# Run a trained preference model over comparisons, on all GPUs of this machine or on its CPU.
#   bash eval/batch_inference_rm_general_preference.sh           the bundled run's model on the bundled test sets
#   PRETRAIN=general-preference/GPM-Llama-3.1-8B-Instruct DATASET=my.jsonl OUTPUT_PATH=my_results.jsonl \
#     bash eval/batch_inference_rm_general_preference.sh --save_embeddings
# Settings: PRETRAIN, DATASET, OUTPUT_PATH, NPROC. Any flag of batch_inference_rm_general_preference.py may follow.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/environment.sh"

PRETRAIN=${PRETRAIN:-$ROOT/checkpoint/rm-tiny}
[[ $PRETRAIN != "$ROOT/checkpoint/rm-tiny" || -f $PRETRAIN/config.json ]] ||
  fail "no model in $PRETRAIN yet: run scripts/run_train_rm_general_preference_single.sh, or set PRETRAIN"
exec "${LAUNCH[@]}" "$ROOT/eval/batch_inference_rm_general_preference.py" \
  --pretrain "$PRETRAIN" \
  --dataset "${DATASET:-$ROOT/data/cyclic/test.jsonl,$ROOT/data/transitive/test.jsonl,$ROOT/data/mixed/test.jsonl}" \
  --output_path "${OUTPUT_PATH:-$ROOT/checkpoint/batch_inference/$(basename "$PRETRAIN").jsonl}" \
  "$@"
