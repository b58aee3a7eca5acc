#!/usr/bin/env bash
# Train one preference model on several nodes, in one of three ways:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 bash scripts/run_train_rm_general_preference_multi.sh
#       the same on each node, with NODE_RANK counting up from 0; MASTER_ADDR is node 0's address
#   bash scripts/run_train_rm_general_preference_multi.sh                  in a Slurm batch script: on all its nodes
#   HOSTFILE=hostfile bash scripts/run_train_rm_general_preference_multi.sh
#       from one machine, over ssh and pdsh by DeepSpeed's launcher; lines `host slots=8`, node 0 first. Also read:
#       MASTER_ADDR, MASTER_PORT, SSH_PORT, PDSH_SSH_ARGS_APPEND, GPUS_PER_HOST (if nvidia-smi cannot tell)
#
# Every node needs this checkout, the environment, model and data at the same paths. Settings and flags as for
# run_train_rm_general_preference_single.sh; NPROC is of each node, GLOBAL_BATCH over all of them.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ALSO_NEEDED=deepspeed

fail() {
  echo "error: $*" >&2
  exit 2
}

by_numbers() { # this node's part of the run; needs NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
  local name
  for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT; do
    [[ -n ${!name:-} ]] || fail "$name is not set: each node needs NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT"
    [[ $name == MASTER_ADDR || ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || fail "$name=${!name} is no number"
  done
  ((NNODES > 0 && NNODES < 100000)) || fail "NNODES=$NNODES is no number of nodes"
  ((NODE_RANK < NNODES)) || fail "NODE_RANK=$NODE_RANK must be from 0 to NNODES - 1 = $((NNODES - 1))"
  source "$HERE/environment.sh"
  PROCESSES=$((NNODES * NPROC))
  on_every_node() { "$@"; }
  source "$HERE/training_settings.sh"
  exec python "$HERE/launch_node.py" --nproc "$NPROC" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "${TRAIN[@]}"
}

by_slurm() { # in the batch step: once more, on every node; in that step: as by numbers
  # The batch and interactive steps have no number, or one far above those of srun's steps.
  if [[ -z ${SLURM_STEP_ID:-} ]] || ((SLURM_STEP_ID >= 4294967280)); then
    local nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
    # srun gives a step one core per task unless told otherwise.
    exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
      ${SLURM_CPUS_ON_NODE:+--cpus-per-task="$SLURM_CPUS_ON_NODE"} bash "$HERE/${BASH_SOURCE[0]##*/}" "$@"
  fi
  NNODES=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-}} NODE_RANK=${SLURM_NODEID:-}
  [[ ${SLURM_STEP_NUM_TASKS:-$NNODES} == "$NNODES" ]] ||
    fail "this Slurm step has $SLURM_STEP_NUM_TASKS tasks on $NNODES nodes: srun --ntasks-per-node=1; NPROC starts more"
  if [[ -z ${MASTER_ADDR:-} ]]; then
    read -r MASTER_ADDR < <(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}") ||
      fail "scontrol names no host of this step: set MASTER_ADDR to the first node's address"
  fi
  MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))} # two jobs may share a node
  by_numbers "$@"
}

read_hostfile() { # sets HOSTS, PROCESSES, NPROC (the most on one host)
  local line number=0 seen=" " slots
  HOSTS=() PROCESSES=0 NPROC=0
  [[ -f $HOSTFILE && -r $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE cannot be read: it needs lines like 'host slots=8'"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ $line =~ ^[[:space:]]*([^[:space:]#]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
      fail "HOSTFILE=$HOSTFILE line $number is not 'host slots=NUMBER': $line"
    slots=${BASH_REMATCH[2]}
    [[ $seen != *" ${BASH_REMATCH[1]} "* ]] || fail "HOSTFILE=$HOSTFILE line $number: ${BASH_REMATCH[1]} comes twice"
    HOSTS+=("${BASH_REMATCH[1]}") seen+="${BASH_REMATCH[1]} " PROCESSES=$((PROCESSES + slots))
    NPROC=$((slots > NPROC ? slots : NPROC))
  done < "$HOSTFILE"
  ((PROCESSES > 0)) || fail "HOSTFILE=$HOSTFILE names no host: it needs lines like 'host slots=8'"
}

on_host() { # host, command...: there, in this folder
  local options=(-n -o BatchMode=yes -o ConnectTimeout=10 ${SSH_PORT:+-p "$SSH_PORT"} ${PDSH_SSH_ARGS_APPEND:-})
  ssh "${options[@]}" "$1" "cd $(printf %q "$PWD") 2>/dev/null; $(printf '%q ' "${@:2}")"
}

on_every_node() { # command...: on every host at once
  local host started=()
  for host in "${HOSTS[@]}"; do
    on_host "$host" env PATH="$PATH" PYTHONPATH="$PYTHONPATH" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-0}" "$@" &
    started+=($!)
  done
  for host in "${!HOSTS[@]}"; do
    wait "${started[host]}" || fail "host ${HOSTS[host]}: '$*' failed there"
  done
}

check_hosts() { # all at once; sets GPUS_PER_HOST and MASTER_ADDR from the first one's answer unless they are set
  local index started=() script=$HERE/train_rm_general_preference.py
  local question='hostname -I; nvidia-smi -L 2> /dev/null | grep -c ^GPU; test -f "$1" || echo missing'
  ANSWERS=$(mktemp -d)
  trap 'rm -rf "$ANSWERS"' EXIT
  for index in "${!HOSTS[@]}"; do
    on_host "${HOSTS[index]}" timeout 15 bash -c "$question" bash "$script" > "$ANSWERS/$index" 2> "$ANSWERS/$index.said" &
    started+=($!)
  done
  for index in "${!HOSTS[@]}"; do
    wait "${started[index]}" ||
      fail "host ${HOSTS[index]} cannot be reached by ssh without a password: $(tail -n 1 "$ANSWERS/$index.said")"
    ! grep -q ^missing "$ANSWERS/$index" || fail "host ${HOSTS[index]} has no $script: the same paths are needed everywhere"
  done
  GPUS_PER_HOST=${GPUS_PER_HOST:-$(sed -n 2p "$ANSWERS/0")}
  MASTER_ADDR=${MASTER_ADDR:-$(head -n 1 "$ANSWERS/0" | cut -d ' ' -f 1)}
  [[ -n $MASTER_ADDR ]] || fail "host ${HOSTS[0]} does not know its address (hostname -I): set MASTER_ADDR"
  rm -rf "$ANSWERS"
  trap - EXIT
}

exported() { # NAME=value lines of what the processes on the other hosts must be told beside what DeepSpeed exports
  grep -sh = "$HOME/${DS_ENV_FILE:-.deepspeed_env}" "./${DS_ENV_FILE:-.deepspeed_env}" || true
  # DeepSpeed puts them on command lines, which everybody on a host can read: no keys, no tokens.
  env | grep -E '^(OMP|GOMP|KMP|MKL|MALLOC|GLOO|NCCL|HF|HUGGINGFACE|TOKENIZERS|TORCH|TRITON|WANDB|DS_ACCELERATOR)[A-Z0-9_]*=' |
    grep -vE '^[A-Z0-9_]*(KEY|TOKEN)=' || true
}

quoted() { # sets QUOTED: the arguments as they survive DeepSpeed's own quoting and a remote shell
  local argument
  QUOTED=()
  for argument in "$@"; do
    if [[ $argument == *" "* ]]; then # DeepSpeed puts it between double quotes and escapes those within
      argument=${argument//\\/\\\\} argument=${argument//\$/\\\$} argument=${argument//\`/\\\`}
    else
      argument=$(printf %q "$argument")
    fi
    QUOTED+=("$argument")
  done
}

by_hostfile() {
  local wanted=${NPROC:-} port=${MASTER_PORT:-29500} file
  read_hostfile
  [[ -z $wanted || $wanted == "$NPROC" ]] || fail "NPROC=$wanted, but HOSTFILE=$HOSTFILE has slots=$NPROC: drop NPROC"
  [[ $port =~ ^[1-9][0-9]*$ ]] || fail "MASTER_PORT=$port is no number"
  command -v pdsh > /dev/null || fail "HOSTFILE needs pdsh (Debian: apt-get install pdsh); NNODES and NODE_RANK do not"
  command -v ssh > /dev/null || fail "HOSTFILE needs ssh (Debian: apt-get install openssh-client)"
  check_hosts
  source "$HERE/environment.sh"
  source "$HERE/training_settings.sh"
  quoted "${TRAIN[@]}"
  file=$(mktemp)
  exported > "$file"
  exec 8< "$file" # DeepSpeed reads it through the descriptor: nothing is left to clean up
  rm "$file"
  # The reachability of every host was checked above; DeepSpeed's own check knows no PDSH_SSH_ARGS_APPEND.
  DS_ENV_FILE=/dev/fd/8 exec deepspeed --hostfile "$HOSTFILE" --launcher pdsh --force_multi --no_ssh_check --log_level warning \
    --master_addr "$MASTER_ADDR" --master_port "$port" ${SSH_PORT:+--ssh_port "$SSH_PORT"} "${QUOTED[@]}"
}

if [[ -n ${HOSTFILE:-} ]]; then
  [[ -z ${NNODES:-}${NODE_RANK:-} ]] || fail "HOSTFILE and NNODES or NODE_RANK are set: choose one way"
  by_hostfile "$@"
elif [[ -n ${NNODES:-}${NODE_RANK:-} || ( -z ${SLURM_JOB_ID:-} && -n ${MASTER_ADDR:-}${MASTER_PORT:-} ) ]]; then
  by_numbers "$@"
elif [[ -n ${SLURM_JOB_ID:-} ]]; then
  by_slurm "$@"
else
  fail "which nodes? Set HOSTFILE, or NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each node, or start this in a" \
    "Slurm allocation; run_train_rm_general_preference_single.sh trains on this machine alone"
fi
