# Sourced by the training launchers, after environment.sh: what is trained, on what and how, with defaults for all of it.
#
# Reads: PROCESSES (over all nodes), GPUS, PRETRAIN, DATASET, EVAL_DATASET, SAVE_PATH, MICRO_BATCH, GLOBAL_BATCH, the
# flags in "$@", and on_every_node, which runs a command where the processes will be.
# Sets: TRAIN, the training script with its flags.

DATA=$ROOT/data
arguments=()
if [[ -z "${DATASET:-}" ]]; then
  EVAL_DATASET=${EVAL_DATASET:-cyclic=$DATA/cyclic/test.jsonl,transitive=$DATA/transitive/test.jsonl,mixed=$DATA/mixed/test.jsonl}
fi
DATASET=${DATASET:-$DATA/cyclic/train.jsonl,$DATA/transitive/train.jsonl,$DATA/mixed/train.jsonl}

head=(--is_general_preference)
if [[ -z "${PRETRAIN:-}" ]]; then
  PRETRAIN=$ROOT/checkpoint/tiny-llama
  on_every_node python "$ROOT/scripts/make_tiny_model.py" "$PRETRAIN"
  head+=(--value_head_dim 4 --add_prompt_head)
  MICRO_BATCH=${MICRO_BATCH:-$((PROCESSES < 16 ? 16 / PROCESSES : 1))}
  [[ ! $MICRO_BATCH =~ ^[1-9][0-9]*$ ]] || GLOBAL_BATCH=${GLOBAL_BATCH:-$((MICRO_BATCH * PROCESSES))}
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
for name in MICRO_BATCH GLOBAL_BATCH; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || { echo "error: $name=${!name} is no number of comparisons" >&2; exit 2; }
done
accumulation=$((GLOBAL_BATCH / (MICRO_BATCH * PROCESSES)))
if ((accumulation * MICRO_BATCH * PROCESSES != GLOBAL_BATCH)); then
  echo "error: GLOBAL_BATCH=$GLOBAL_BATCH is no multiple of MICRO_BATCH=$MICRO_BATCH times $PROCESSES processes: change one" >&2
  exit 2
fi
[[ " $* " == *" --preference_head"* ]] && head=() # the caller chooses the whole head

TRAIN=(
  "$ROOT/scripts/train_rm_general_preference.py"
  --pretrain "$PRETRAIN"
  --dataset "$DATASET"
  ${EVAL_DATASET:+--eval_dataset "$EVAL_DATASET"}
  --save_path "$SAVE_PATH"
  --micro_train_batch_size "$MICRO_BATCH"
  --accumulated_gradient "$accumulation"
  "${head[@]}" "${arguments[@]}" "$@"
)
