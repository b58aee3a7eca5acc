# Sourced by the training launchers, after environment.sh: what is trained, on what and how, with defaults for all of it.
#
# Reads: PROCESSES (over all nodes), PRETRAIN, DATASET, EVAL_DATASET, SAVE_PATH, MICRO_BATCH, GLOBAL_BATCH, flags in "$@".
# Sets: TRAIN, the training script with its flags: the preset (presets/tiny.yaml, with PRETRAIN presets/paper.yaml), what
# is computed here, and "$@", in which each wins over those before it.

DATA=$ROOT/data
if [[ -z ${DATASET:-} ]]; then
  EVAL_DATASET=${EVAL_DATASET:-cyclic=$DATA/cyclic/test.jsonl,transitive=$DATA/transitive/test.jsonl,mixed=$DATA/mixed/test.jsonl}
fi
DATASET=${DATASET:-$DATA/cyclic/train.jsonl,$DATA/transitive/train.jsonl,$DATA/mixed/train.jsonl}
if [[ -z ${PRETRAIN:-} ]]; then
  PRESET=tiny PRETRAIN=$ROOT/checkpoint/tiny-llama SAVE_PATH=${SAVE_PATH:-$ROOT/checkpoint/rm-tiny}
  python "$ROOT/scripts/make_tiny_model.py" "$PRETRAIN"
  MICRO_BATCH=${MICRO_BATCH:-$((PROCESSES < 16 ? 16 / PROCESSES : 1))}
  [[ ! $MICRO_BATCH =~ ^[1-9][0-9]*$ ]] || GLOBAL_BATCH=${GLOBAL_BATCH:-$((MICRO_BATCH * PROCESSES))}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # so small a model loses more to threads than it gains
fi
MICRO_BATCH=${MICRO_BATCH:-2} GLOBAL_BATCH=${GLOBAL_BATCH:-32}
for name in MICRO_BATCH GLOBAL_BATCH; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name} is no number of comparisons"
done
((GLOBAL_BATCH % (MICRO_BATCH * PROCESSES) == 0)) ||
  fail "GLOBAL_BATCH=$GLOBAL_BATCH is no multiple of MICRO_BATCH=$MICRO_BATCH times $PROCESSES processes: change one"

TRAIN=(
  "$ROOT/scripts/train_rm_general_preference.py"
  --config "$ROOT/scripts/presets/${PRESET:-paper}.yaml"
  --pretrain "$PRETRAIN"
  --dataset "$DATASET"
  ${EVAL_DATASET:+--eval_dataset "$EVAL_DATASET"}
  --save_path "${SAVE_PATH:-$ROOT/checkpoint/rm-$(basename "$PRETRAIN")}"
  --micro_train_batch_size "$MICRO_BATCH"
  --accumulated_gradient "$((GLOBAL_BATCH / (MICRO_BATCH * PROCESSES)))"
  $( ((GPUS == 0)) || [[ ${PRESET:-} == tiny ]] || echo --bf16)
  "$@"
)
