#!/usr/bin/env bash
# Train one preference model on this machine: all its GPUs, or its CPU.
#
#   bash scripts/run_train_rm_general_preference_single.sh                      tiny model on the bundled comparisons
#   bash scripts/run_train_rm_general_preference_single.sh --preference_head bt        the same as Bradley-Terry
#   PRETRAIN=google/gemma-2b-it DATASET=my.jsonl bash scripts/run_train_rm_general_preference_single.sh \
#       --value_head_dim 6 --add_prompt_head                                    a real one
#
# Settings: PRETRAIN, DATASET, EVAL_DATASET, SAVE_PATH, NPROC, MICRO_BATCH, GLOBAL_BATCH. Any flag of
# train_rm_general_preference.py may follow and wins over what is set here.
set -euo pipefail
ALSO_NEEDED=deepspeed
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

DATA=$ROOT/data
arguments=()
if [[ -z "${DATASET:-}" ]]; then
  EVAL_DATASET=${EVAL_DATASET:-cyclic=$DATA/cyclic/test.jsonl,transitive=$DATA/transitive/test.jsonl,mixed=$DATA/mixed/test.jsonl}
fi
DATASET=${DATASET:-$DATA/cyclic/train.jsonl,$DATA/transitive/train.jsonl,$DATA/mixed/train.jsonl}

head=(--is_general_preference)
if [[ -z "${PRETRAIN:-}" ]]; then
  PRETRAIN=$ROOT/checkpoint/tiny-llama
  python "$ROOT/scripts/make_tiny_model.py" "$PRETRAIN"
  head+=(--value_head_dim 4 --add_prompt_head)
  MICRO_BATCH=${MICRO_BATCH:-$((NPROC < 16 ? 16 / NPROC : 1))} GLOBAL_BATCH=${GLOBAL_BATCH:-$((MICRO_BATCH * NPROC))}
  # A random start wants a higher learning rate and temperature than a pretrained model.
  arguments+=(--learning_rate 3e-3 --max_epochs 8 --max_len 256 --logging_steps 10 --eval_steps 152)
  [[ " $* " == *" --preference_head"[\ =]"bt "* ]] || arguments+=(--general_preference_tau 0.25)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # so small a model loses more to threads than it gains
  SAVE_PATH=${SAVE_PATH:-$ROOT/checkpoint/rm-tiny}
else
  # The paper's settings; --learning_rate 2e-6 for 8B models. `--add_prompt_head false` goes without the gate.
  head+=(--value_head_dim 6 --add_prompt_head)
  arguments+=(--learning_rate 1e-5 --max_epochs 2 --max_len 2048 --gradient_checkpointing)
  ((GPUS > 0)) && arguments+=(--bf16)
  SAVE_PATH=${SAVE_PATH:-$ROOT/checkpoint/rm-$(basename "$PRETRAIN")}
fi
MICRO_BATCH=${MICRO_BATCH:-2} GLOBAL_BATCH=${GLOBAL_BATCH:-32}
accumulation=$((GLOBAL_BATCH / (MICRO_BATCH * NPROC)))
if ((accumulation * MICRO_BATCH * NPROC != GLOBAL_BATCH)); then
  echo "error: GLOBAL_BATCH=$GLOBAL_BATCH is no multiple of MICRO_BATCH=$MICRO_BATCH times $NPROC processes: change one" >&2
  exit 2
fi
[[ " $* " == *" --preference_head"* ]] && head=() # the caller chooses the whole head

exec "${LAUNCH[@]}" "$ROOT/scripts/train_rm_general_preference.py" \
  --pretrain "$PRETRAIN" \
  --dataset "$DATASET" \
  ${EVAL_DATASET:+--eval_dataset "$EVAL_DATASET"} \
  --save_path "$SAVE_PATH" \
  --micro_train_batch_size "$MICRO_BATCH" \
  --accumulated_gradient "$accumulation" \
  "${head[@]}" "${arguments[@]}" "$@"
