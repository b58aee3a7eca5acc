#!/usr/bin/env bash
# Train over two "hosts" of this machine, and break them: two network namespaces with an address each, joined by a cable.
#
#   sudo bash tests/cluster/two_hosts.sh                about five minutes on two cores; needs iproute2
#
# Runs the multi-node launcher by NODE_RANK and by HOSTFILE (needs openssh-server and pdsh, else skipped) and the
# single-node one on two processes, and compares what they logged. Then a wrong address, disagreeing node counts, a
# killed process and a cut cable, each of which must end both hosts in time. Settings: FOLDER (kept if set).
# Exit codes: 0 everything passed, 1 something failed, 2 cannot run here, 3 passed, but the hostfile part was skipped.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ $(id -u) == 0 ]] && command -v ip > /dev/null || { echo "error: needs root and iproute2" >&2; exit 2; }
KEEP=${FOLDER:+yes} FOLDER=${FOLDER:-$(mktemp -d)}
mkdir -p "$FOLDER"
NAME=gpm$$ ADDRESS=(10.213.7.1 10.213.7.2) PORT=29600 SSH_PORT=2222
MULTI=$ROOT/scripts/run_train_rm_general_preference_multi.sh
FLAGS=(--max_samples 400 --max_epochs 1 --eval_steps -1 --seed 3 --logging_steps 5)
failures=0 started=() BASE=()

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

start_node() { # host, name, NNODES, MASTER_ADDR, flags...; BASE: settings as NAME=value
  local host=$1 name=$2 nodes=$3 address=$4
  start_on "$host" "$name" env NNODES="$nodes" NODE_RANK="$host" MASTER_ADDR="$address" MASTER_PORT=$PORT NPROC=1 \
    "${BASE[@]}" SAVE_PATH="$FOLDER/$name" bash "$MULTI" "${FLAGS[@]}" "${@:5}"
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

start_sshd() { # one in each host, with keys and settings of its own
  local host
  mkdir -p "$FOLDER/ssh" /run/sshd
  chmod 700 "$FOLDER" "$FOLDER/ssh"
  ssh-keygen -q -t ed25519 -N "" -f "$FOLDER/ssh/key"
  ssh-keygen -q -t ed25519 -N "" -f "$FOLDER/ssh/host_key"
  cp "$FOLDER/ssh/key.pub" "$FOLDER/ssh/authorized"
  for host in 0 1; do
    echo "[${ADDRESS[host]}]:$SSH_PORT $(cat "$FOLDER/ssh/host_key.pub")" >> "$FOLDER/ssh/known"
    echo "${ADDRESS[host]} slots=1" >> "$FOLDER/hostfile"
    start_on "$host" sshd "$(command -v sshd)" -D -e -f /dev/null -p $SSH_PORT -h "$FOLDER/ssh/host_key" \
      -o AuthorizedKeysFile="$FOLDER/ssh/authorized" -o PidFile=none -o StrictModes=no -o UsePAM=no \
      -o PermitRootLogin=prohibit-password -o ListenAddress="${ADDRESS[host]}"
  done
}

kill_python() { # host: the training process there, as a dead node would lose it
  local process
  for process in $(ip netns pids "$NAME-$1"); do
    if tr '\0' ' ' < "/proc/$process/cmdline" | grep -q "^[^ ]*python[^ ]* [^ ]*train_rm_general_preference.py"; then
      kill -KILL "$process"
    fi
  done
}

make_hosts
echo "== one node, two processes"
began=$SECONDS
NPROC=2 SAVE_PATH="$FOLDER/single" bash "$ROOT/scripts/run_train_rm_general_preference_single.sh" "${FLAGS[@]}" \
  > "$FOLDER/single.log" 2>&1 && code=0 || code=$?
report $((code == 0)) "exit code $code, $((SECONDS - began)) s"

echo "== two nodes by their numbers"
began=$SECONDS
start_node 1 numbers 2 "${ADDRESS[0]}" && second=$last
start_node 0 numbers 2 "${ADDRESS[0]}" && first=$last
wait_for 120 "$first" && codes=$code
wait_for 30 "$second" && codes+=" $code"
report "$([[ $codes == "0 0" ]] && echo 1)" "exit codes $codes, $((SECONDS - began)) s"
difference=$(compare single numbers) && passed=1 || passed=0
report $passed "against one node: $difference"

echo "== two nodes by a hostfile"
skipped=""
if command -v sshd > /dev/null && command -v pdsh > /dev/null; then
  began=$SECONDS
  start_sshd
  wait_for_text 10 "listening" "$FOLDER/sshd.0.log" && wait_for_text 10 "listening" "$FOLDER/sshd.1.log"
  options="-i $FOLDER/ssh/key -o UserKnownHostsFile=$FOLDER/ssh/known -o IdentitiesOnly=yes"
  start_on 0 hostfile env HOSTFILE="$FOLDER/hostfile" SSH_PORT=$SSH_PORT PDSH_SSH_ARGS_APPEND="$options" \
    MASTER_PORT=$PORT SAVE_PATH="$FOLDER/hostfile_run" bash "$MULTI" "${FLAGS[@]}"
  wait_for 120 "$last"
  report $((code == 0)) "exit code $code, $((SECONDS - began)) s"
  difference=$(compare single hostfile_run) && passed=1 || passed=0
  report $passed "against one node: $difference"
  echo "10.213.7.9 slots=1" > "$FOLDER/away"
  start_on 0 away env HOSTFILE="$FOLDER/away" SSH_PORT=$SSH_PORT bash "$MULTI"
  wait_for 30 "$last"
  report $((code == 2)) "a host that is not there: exit code $code: $(tail -n 1 "$FOLDER/away.0.log")"
else
  skipped=yes
  echo "SKIPPED: install openssh-server and pdsh for this part"
fi

# From here on the tiny model is there: only the time to fail counts.
BASE=(PRETRAIN="$ROOT/checkpoint/tiny-llama" MICRO_BATCH=2 GLOBAL_BATCH=12)
FLAGS+=(--max_len 256 --logging_steps 1)

echo "== a wrong address, and node counts that disagree"
began=$SECONDS
start_node 1 wrong 2 10.213.7.9 --dist_timeout 20 && third=$last
start_node 0 disagree 2 "${ADDRESS[0]}" && first=$last
start_node 1 disagree 3 "${ADDRESS[0]}" && second=$last
wait_for 90 "$first" && codes=$code
wait_for 10 "$second" && codes+=" $code"
report "$([[ $codes == "2 2" ]] && echo 1)" "exit codes $codes, $((SECONDS - began)) s: $(grep -h ^error "$FOLDER/disagree.1.log")"
wait_for 60 "$third"
said=$(grep "^error" "$FOLDER/wrong.1.log" || true)
report "$([[ $code =~ ^[12]$ && $said == *10.213.7.9* ]] && echo 1)" "exit code $code, $((SECONDS - began)) s: $said"

for break in "a killed process" "a cut cable"; do
  echo "== $break"
  name=${break// /_}
  start_node 0 "$name" 2 "${ADDRESS[0]}" --max_samples 3000 --max_epochs 50 && first=$last
  start_node 1 "$name" 2 "${ADDRESS[0]}" --max_samples 3000 --max_epochs 50 && second=$last
  wait_for_text 90 train/loss "$FOLDER/$name/metrics.jsonl" || report 0 "did not get to train"
  began=$SECONDS
  if [[ $break == "a cut cable" ]]; then
    ip -n "$NAME-1" link set "c1-$$" down
  else
    kill_python 1
  fi
  wait_for 60 "$first" && codes=$code
  wait_for 60 "$second" && codes+=" $code"
  late=$((SECONDS - began))
  report "$([[ $codes != *124* && $codes != 0* && $codes != *" 0" ]] && ((late <= 60)) && echo 1)" "exit codes $codes, $late s"
  for host in 0 1; do
    grep -hE "error:|Error|launch_node.py:" "$FOLDER/$name.$host.log" | tail -n 3 | cut -c -150 | sed "s/^/      host $host: /" || true
  done
done

echo
if ((failures > 0)); then
  KEEP=yes
  echo "$failures failed after $SECONDS s; logs in $FOLDER"
  exit 1
fi
echo "all passed in $SECONDS s${skipped:+, without the hostfile part}"
exit ${skipped:+3}
