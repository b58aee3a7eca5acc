#!/usr/bin/env bash
# Checkpoints on disks that fail: one that becomes full, one that becomes read-only. Needs root (it mounts small tmpfs).
#
#   sudo bash tests/cluster/disks.sh          about two minutes; exit code 0 if all went as it should
#
# Each time the run must end with code 1 and one line that names the folder, what was saved before must be whole, and
# once the disk is well again the run must go on from there to the result of a run that met no trouble.
set -euo pipefail
ALSO_NEEDED=deepspeed
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/environment.sh"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
[[ $EUID == 0 ]] || { echo "error: mounting needs root: sudo bash $0" >&2; exit 2; }

BASE=$(mktemp -d)
cleanup() {
  umount "$BASE"/*/checkpoint 2> /dev/null || true
  rm -rf "$BASE"
}
trap cleanup EXIT
failures=0
check() { # what, command...
  if "${@:2}"; then echo "ok: $1"; else echo "FAILED: $1"; failures=$((failures + 1)); fi
}
train() { # folder, more flags: its exit code in CODE, its output in folder.log
  CODE=0
  python "$ROOT/scripts/train_rm_general_preference.py" --pretrain "$BASE/model" --dataset "$ROOT/data/cyclic/train.jsonl" \
    --max_samples 60 --train_split_ratio 0.8 --max_len 256 --learning_rate 1e-3 --micro_train_batch_size 4 --eval_steps 6 \
    --is_general_preference --value_head_dim 4 --add_prompt_head --save_steps 2 --max_ckpt_num 9 --load_checkpoint \
    --save_path "$@" > "$1.log" 2>&1 || CODE=$?
}
same_result() { cmp -s "$BASE/whole/model.safetensors" "$1/model.safetensors"; }
said() { grep -q "$2" "$1.log"; }
small_disk() { # folder, size
  mkdir -p "$1/checkpoint"
  mount -t tmpfs -o size="$2" tmpfs "$1/checkpoint"
}

python "$ROOT/scripts/make_tiny_model.py" "$BASE/model" > /dev/null
train "$BASE/whole"
check "a run on a good disk ends with 0" test "$CODE" == 0

small_disk "$BASE/full" 5m # two checkpoints of 1.8 MB
train "$BASE/full"
tail -n 1 "$BASE/full.log"
check "full disk: exit code 1" test "$CODE" == 1
check "full disk: the error names the folder" said "$BASE/full" "cannot write $BASE/full/checkpoint: "
check "full disk: and the reason" said "$BASE/full" "No space left on device"
check "full disk: no traceback" bash -c "! grep -q Traceback $BASE/full.log"
check "full disk: two checkpoints stand, nothing half-written" \
  test "$(cd "$BASE/full/checkpoint" && echo $(ls -A))" == "latest step_2 step_4"
mount -o remount,size=100m "$BASE/full/checkpoint"
train "$BASE/full"
check "with more room it goes on from the last one" said "$BASE/full" "continuing from $BASE/full/checkpoint/step_4"
check "and comes to the same model" same_result "$BASE/full"

small_disk "$BASE/read_only" 100m
train "$BASE/read_only" & # becomes read-only after the first checkpoint
while [[ ! -e $BASE/read_only/checkpoint/latest ]]; do sleep 0.01; done
until mount -o remount,ro "$BASE/read_only/checkpoint" 2> /dev/null; do sleep 0.01; done # not while a file is open
wait
tail -n 1 "$BASE/read_only.log"
check "read-only: the error names the folder" said "$BASE/read_only" "cannot write $BASE/read_only/checkpoint: "
check "read-only: no traceback" bash -c "! grep -q Traceback $BASE/read_only.log"
mount -o remount,rw "$BASE/read_only/checkpoint"
train "$BASE/read_only"
check "writable again, it goes on" said "$BASE/read_only" "continuing from"
check "and comes to the same model" same_result "$BASE/read_only"

mkdir "$BASE/never"
mount -t tmpfs -o size=1m,ro tmpfs "$BASE/never" && mkdir -p "$BASE/x"
train "$BASE/x" --ckpt_path "$BASE/never"
tail -n 1 "$BASE/x.log"
umount "$BASE/never"
check "read-only from the start: exit code 2" test "$CODE" == 2
check "and the flag is named" said "$BASE/x" "error: --ckpt_path $BASE/never cannot be written"

echo "$failures failures"
exit $((failures > 0))
