#!/usr/bin/env bash
# Align a policy with a preference model, over several iterations of: sample, score, train, compare.
#
#   bash scripts/run_align_general_preference.sh                                 tiny models on the bundled prompts
#   POLICY=meta-llama/Meta-Llama-3-8B-Instruct PREFERENCE=general-preference/GPM-Gemma-2B \
#     PROMPTS=prompts_1.jsonl,prompts_2.jsonl,prompts_3.jsonl EVAL_PROMPTS=held_out.jsonl SAVE_PATH=runs/gpo \
#     bash scripts/run_align_general_preference.sh --recipe gpo --bf16           a real one
#
# Settings: POLICY, PREFERENCE, JUDGE (a second preference model, for the report alone), PROMPTS (one entry for each
# iteration; the last is used again), EVAL_PROMPTS, ITERATIONS, SAMPLES (per prompt), TOKENS (of a response), SAVE_PATH,
# NPROC, RESTARTS, GENERATE_PYTHON (a Python with vLLM), GENERATE_FLAGS (more flags of generate_responses.py, such as
# "--max_prompt_tokens 2048"). Flags of train_policy_general_preference.py may follow and win.
#
# Every stage leaves its file complete or not at all and skips what is done: run the same command again to continue.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ALSO_NEEDED=deepspeed
source "$HERE/environment.sh"
RUN=${SAVE_PATH:-$ROOT/checkpoint/align-tiny}
TRAIN_FLAGS=()
if [[ -z ${POLICY:-} ]]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  DATA=$ROOT/data
  if [[ -z ${PREFERENCE:-} ]]; then
    PREFERENCE=$RUN/preference
    if [[ ! -f $PREFERENCE/eval_metrics.json ]]; then
      SAVE_PATH=$PREFERENCE bash "$HERE/run_train_rm_general_preference_single.sh" --load_checkpoint
    fi
  fi
  SPEAKS=() # of all bundled prompts, unless the default ones are meant, which take less time to learn
  [[ -n ${PROMPTS:-} ]] || SPEAKS=(--data "$DATA/mixed/train.jsonl")
  python "$HERE/make_tiny_policy.py" "$RUN/start" "${SPEAKS[@]}"
  POLICY=$RUN/start/policy
  PROMPTS=${PROMPTS:-$DATA/mixed/train.jsonl} EVAL_PROMPTS=${EVAL_PROMPTS:-$DATA/mixed/test.jsonl}
  ITERATIONS=${ITERATIONS:-3} SAMPLES=${SAMPLES:-8} TOKENS=${TOKENS:-48}
  TRAIN_FLAGS=(--beta 2 --learning_rate 3e-4 --max_epochs 2 --zero_stage 0 --logging_steps 10 --lr_schedule constant)
fi
[[ -n ${PREFERENCE:-} ]] || fail "PREFERENCE names no preference model"
[[ -n ${PROMPTS:-} ]] || fail "PROMPTS names no prompts"
[[ -n ${EVAL_PROMPTS:-} ]] || fail "EVAL_PROMPTS names no held-out prompts, on which iterations are compared"
ITERATIONS=${ITERATIONS:-3} SAMPLES=${SAMPLES:-5} TOKENS=${TOKENS:-1024}
for name in ITERATIONS SAMPLES TOKENS; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name} is no number of at least 1"
done
IFS=, read -ra PARTS <<< "$PROMPTS"
read -ra GENERATE_MORE <<< "${GENERATE_FLAGS:-}"

sample() { # policy, prompts, output
  "${LAUNCH[@]}" "$HERE/generate_responses.py" --policy "$1" --prompts "$2" --output "$3" --samples "$SAMPLES" \
    --max_new_tokens "$TOKENS" "${GENERATE_MORE[@]}"
}

go_on_from() { # policy, folder for its merged model: vLLM reads no adapters
  current=$1
  if [[ -n ${GENERATE_PYTHON:-} && -f $1/adapter_config.json ]]; then
    python "$HERE/merge_lora.py" "$1" "$2" --skip_finished
    current=$2
  fi
}

compared=()
mkdir -p "$RUN/start"
go_on_from "$POLICY" "$RUN/start/merged"
sample "$current" "$EVAL_PROMPTS" "$RUN/start/held_out.jsonl"
compared+=("start=$RUN/start/held_out.jsonl")
for ((t = 1; t <= ITERATIONS; t++)); do
  echo "== iteration $t ==" >&2
  folder=$RUN/iter_$t
  mkdir -p "$folder"
  part=$((t <= ${#PARTS[@]} ? t - 1 : ${#PARTS[@]} - 1))
  sample "$current" "${PARTS[$part]}" "$folder/samples.jsonl"
  "${LAUNCH[@]}" "$HERE/score_responses.py" --model "$PREFERENCE" --samples "$folder/samples.jsonl" \
    --output "$folder/scored.jsonl"
  "${LAUNCH[@]}" "$HERE/train_policy_general_preference.py" --policy "$current" --samples "$folder/samples.jsonl" \
    --scores "$folder/scored.jsonl" --save_path "$folder/policy" --start "$POLICY" --iteration "$t" --load_checkpoint \
    --skip_finished "${TRAIN_FLAGS[@]}" "$@"
  go_on_from "$folder/policy" "$folder/merged"
  sample "$current" "$EVAL_PROMPTS" "$folder/held_out.jsonl"
  compared+=("$t=$folder/held_out.jsonl")
  "${LAUNCH[@]}" "$HERE/compare_policies.py" --samples "${compared[@]}" --model "$PREFERENCE" \
    ${JUDGE:+--judge "$JUDGE"} --train_report "$folder/policy/train_report.json" --output "$folder/report.json" \
    --skip_finished
done
echo "Policies, samples and reports: $RUN"
