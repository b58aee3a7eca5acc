#!/usr/bin/env bash
# Train over two "hosts" of this machine, and break them: two network namespaces with an address each, joined by a cable.
#
#   sudo bash tests/cluster/two_hosts.sh                about three minutes on two cores; needs iproute2
#
# Runs the multi-node launcher on both and the single-node one on two processes, and compares what they logged. Then a
# host that never comes, a killed process, and the same with RESTARTS=1. Settings: FOLDER (kept if set).
# Exit codes: 0 everything passed, 1 something failed, 2 cannot run here.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ $(id -u) == 0 ]] && command -v ip > /dev/null || { echo "error: needs root and iproute2" >&2; exit 2; }
KEEP=${FOLDER:+yes} FOLDER=${FOLDER:-$(mktemp -d)}
mkdir -p "$FOLDER"
NAME=gpm$$ ADDRESS=(10.213.7.1 10.213.7.2) PORT=29600
MULTI=$ROOT/scripts/run_train_rm_general_preference_multi.sh
FLAGS=(--max_samples 400 --max_epochs 4 --eval_steps -1 --seed 3 --logging_steps 5 --save_steps 10)
export HF_HUB_OFFLINE=1
failures=0 started=()

cleanup() {
  trap - EXIT INT TERM
  exec 2> /dev/null # what the shell says of processes that it kills here
  local process host
  for process in "${started[@]}"; do kill -KILL -- "-$process" 2> /dev/null || true; done
  for host in 0 1; do
    # What a killed launcher left in a namespace was started by this script: nothing else runs there.
    ip netns pids "$NAME-$host" 2> /dev/null | xargs -r kill -KILL 2> /dev/null || true
    ip netns del "$NAME-$host" 2> /dev/null || true
  done
  wait 2> /dev/null || true
  [[ -n $KEEP ]] || rm -rf "$FOLDER"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

make_hosts() {
  local host
  for host in 0 1; do ip netns add "$NAME-$host"; done
  ip link add "c0-$$" netns "$NAME-0" type veth peer name "c1-$$" netns "$NAME-1"
  for host in 0 1; do
    ip -n "$NAME-$host" link set lo up
    ip -n "$NAME-$host" address add "${ADDRESS[host]}/24" dev "c$host-$$"
    ip -n "$NAME-$host" link set "c$host-$$" up
  done
}

start_on() { # host, name of the log, command...: in the background, in a session of its own; sets `last`
  local host=$1 log=$2
  setsid ip netns exec "$NAME-$host" "${@:3}" > "$FOLDER/$log.$host.log" 2>&1 &
  last=$!
  started+=("$last")
}

start_node() { # host, name, settings as NAME=value..., then flags
  local host=$1 name=$2 settings=()
  shift 2
  while [[ ${1:-} == *=* ]]; do settings+=("$1") && shift; done
  start_on "$host" "$name" env NNODES=2 NODE_RANK="$host" MASTER_ADDR="${ADDRESS[0]}" MASTER_PORT=$PORT NPROC=1 \
    LOCAL_ADDR="${ADDRESS[host]}" GLOO_SOCKET_IFNAME="c$host-$$" SAVE_PATH="$FOLDER/$name" "${settings[@]}" \
    bash "$MULTI" "${FLAGS[@]}" "$@"
}

wait_for() { # seconds, process: sets `code`; 124 if it still ran, and was killed
  local end=$((SECONDS + $1))
  while kill -0 "$2" 2> /dev/null && ((SECONDS < end)); do sleep 0.2; done
  if kill -0 "$2" 2> /dev/null; then
    code=124
    kill -KILL -- "-$2"
  else
    code=0
    wait "$2" || code=$?
  fi
}

wait_for_text() { # seconds, text, file: until the file holds it
  local end=$((SECONDS + $1))
  until grep -qs "$2" "$3"; do
    ((SECONDS < end)) || return 1
    sleep 0.2
  done
}

report() { # condition (0 or 1), what
  if [[ $1 == 1 ]]; then
    echo "ok    $2"
  else
    echo "FAIL  $2"
    failures=$((failures + 1))
  fi
}

compare() { # two runs: the largest difference of what both logged
  python - "$FOLDER/$1/metrics.jsonl" "$FOLDER/$2/metrics.jsonl" <<'PY'
import json, sys
first, second = ([json.loads(line) for line in open(path)] for path in sys.argv[1:])
wanted = lambda row: {k: v for k, v in row.items() if k in ("train/loss", "train/accuracy") or k.startswith("eval/")}
first, second = ([wanted(row) for row in rows] for rows in (first, second))
same = [sorted(row) for row in first] == [sorted(row) for row in second]
pairs = [(a[k], b[k]) for a, b in zip(first, second) for k in a if k in b and isinstance(a[k], (int, float))]
largest = max((abs(a - b) for a, b in pairs), default=float("nan"))
print(f"{len(pairs)} numbers, largest difference {largest:.1e}")
sys.exit(not (same and pairs and largest <= 1e-6))
PY
}

kill_worker() { # host: the training process there, as a node short of memory would lose it
  local process
  for process in $(ip netns pids "$NAME-$1"); do
    if tr '\0' ' ' < "/proc/$process/cmdline" | grep -qE "^[^ ]*python[^ ]* (-u )?[^ ]*train_rm_general_preference.py"; then
      kill -KILL "$process"
    fi
  done
}

start_both() { # name, settings and flags: sets `first` and `second`
  start_node 0 "$@" && first=$last
  start_node 1 "$@" && second=$last
}

wait_for_both() { # seconds: sets `codes`
  wait_for "$1" "$first" && codes=$code
  wait_for 30 "$second" && codes+=" $code"
}

make_hosts
echo "== one node, two processes"
began=$SECONDS
NPROC=2 SAVE_PATH="$FOLDER/single" bash "$ROOT/scripts/run_train_rm_general_preference_single.sh" "${FLAGS[@]}" \
  > "$FOLDER/single.log" 2>&1 && code=0 || code=$?
report $((code == 0)) "exit code $code, $((SECONDS - began)) s"

echo "== two nodes"
began=$SECONDS
start_both two
wait_for_both 120
report "$([[ $codes == "0 0" ]] && echo 1)" "exit codes $codes, $((SECONDS - began)) s"
difference=$(compare single two) && passed=1 || passed=0
report $passed "against one node: $difference"

for host in 0 1; do
  echo "== only host $host comes"
  began=$SECONDS
  start_node "$host" only JOIN_TIMEOUT=10 PRETRAIN="$ROOT/checkpoint/tiny-llama" && first=$last
  wait_for 90 "$first"
  said=$(cat "$FOLDER/only.$host.log")
  report "$([[ $code == 1 && $said == "error: the nodes did not meet"* && $said != *$'\n'* ]] && echo 1)" \
    "exit code $code, $((SECONDS - began)) s: $said"
done

for restarts in 0 1; do
  echo "== a killed process, RESTARTS=$restarts"
  name=killed_$restarts
  start_both "$name" RESTARTS=$restarts
  wait_for_text 90 step_ "$FOLDER/$name/checkpoint/latest" || report 0 "did not get to train"
  kill_worker 1
  began=$SECONDS
  wait_for_both 120
  late="exit codes $codes, $((SECONDS - began)) s"
  if [[ $restarts == 0 ]]; then
    report "$([[ $codes == "1 137" || $codes == "143 137" ]] && ((SECONDS - began <= 60)) && echo 1)" "$late"
    report "$(grep -q "error: process . was ended by SIGKILL" "$FOLDER/$name.1.log" && echo 1)" "the process is named"
  else
    report "$([[ $codes == "0 0" ]] && echo 1)" "$late"
    report "$(grep -hq "continuing from" "$FOLDER/$name".?.log && echo 1)" "it continued from a checkpoint"
    difference=$(compare single "$name") && passed=1 || passed=0
    report $passed "against one node: $difference"
  fi
done

echo
if ((failures > 0)); then
  KEEP=yes
  echo "$failures failed after $SECONDS s; logs in $FOLDER"
  exit 1
fi
echo "all passed in $SECONDS s"
