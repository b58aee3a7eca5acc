#!/usr/bin/env bash
# Train the four kinds of head on the bundled comparisons and compare them: a table on screen and a picture.
#
#   bash scripts/run_quickstart.sh          about five minutes on two cores
#
# Settings: SAVE_PATH (folder of the four runs). Flags that follow go to every run.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ALSO_NEEDED=deepspeed
source "$HERE/environment.sh"
RUNS=${SAVE_PATH:-$ROOT/checkpoint/quickstart}

train() { # name, flags...
  echo "== $1 ==" >&2
  SAVE_PATH="$RUNS/$1" bash "$HERE/run_train_rm_general_preference_single.sh" "${@:2}"
}
train bt --preference_head bt "$@"
train gpm_d2 --preference_head gpm --value_head_dim 2 "$@"
train gpm_d4_gate --preference_head gpm --value_head_dim 4 --add_prompt_head "$@"
# A normalized plane could not outweigh the unbounded number beside it.
train hybrid_d3 --preference_head hybrid --value_head_dim 3 --normalize false "$@"
exec python "$HERE/compare_runs.py" "$RUNS"/{bt,gpm_d2,gpm_d4_gate,hybrid_d3} --output "$RUNS/comparison.png" \
  --cycle "$ROOT/data/cyclic/test.jsonl"
