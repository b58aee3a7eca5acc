#!/usr/bin/env bash
# Train one preference model on several nodes, in one of three ways:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 bash scripts/run_train_rm_general_preference_multi.sh
#       the same on each node, with another NODE_RANK (0 at MASTER_ADDR; needed where that is not the host's name)
#   bash scripts/run_train_rm_general_preference_multi.sh                  in a Slurm allocation: on all its nodes
#   HOSTFILE=hostfile bash scripts/run_train_rm_general_preference_multi.sh
#       from one machine, over ssh and pdsh by DeepSpeed's launcher; lines `host slots=8`, node 0 first. Also read:
#       MASTER_ADDR, MASTER_PORT, SSH_PORT
#
# Every node needs this checkout, the environment, model and data at the same paths. Settings and flags as for
# run_train_rm_general_preference_single.sh; NPROC is of each node, GLOBAL_BATCH over all of them. JOIN_TIMEOUT: seconds
# until all nodes must have come (600). LOCAL_ADDR: this node's address, where the others cannot resolve its host name.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ALSO_NEEDED=deepspeed

if [[ -n ${SLURM_JOB_ID:-} && -z ${HOSTFILE:-}${NNODES:-} ]]; then # once more, on every node
  export NNODES=${SLURM_JOB_NUM_NODES:-$SLURM_NNODES}
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
  export MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))} # two jobs may share a node
  # srun gives a step one core per task unless told otherwise.
  exec srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    ${SLURM_CPUS_ON_NODE:+--cpus-per-task="$SLURM_CPUS_ON_NODE"} \
    bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' bash "$HERE/${BASH_SOURCE[0]##*/}" "$@"
fi

source "$HERE/environment.sh"
if [[ -n ${HOSTFILE:-} ]]; then
  PROCESSES=$(awk -F 'slots=' '!/^ *#/ { sum += $2 } END { print sum + 0 }' "$HOSTFILE")
  ((PROCESSES > 0)) || fail "HOSTFILE=$HOSTFILE has no line like 'host slots=8'"
  source "$HERE/training_settings.sh"
  exec deepspeed --hostfile "$HOSTFILE" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
    ${MASTER_PORT:+--master_port "$MASTER_PORT"} ${SSH_PORT:+--ssh_port "$SSH_PORT"} "${TRAIN[@]}"
fi
for name in NNODES MASTER_ADDR MASTER_PORT; do
  [[ -n ${!name:-} ]] || fail "$name is not set: set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each node, or" \
    "HOSTFILE, or start this in a Slurm allocation; run_train_rm_general_preference_single.sh trains on this machine alone"
done
[[ $NNODES =~ ^[1-9][0-9]*$ && ${NODE_RANK:-0} =~ ^[0-9]+$ ]] && ((${NODE_RANK:-0} < NNODES)) ||
  fail "NNODES=$NNODES and NODE_RANK=${NODE_RANK:-} do not fit: NODE_RANK counts from 0 to NNODES - 1"
PROCESSES=$((NNODES * NPROC))
source "$HERE/training_settings.sh"
wait=${JOIN_TIMEOUT:-600}
exec python "$HERE/launch.py" --nproc-per-node "$NPROC" --max-restarts "$RESTARTS" --nnodes "$NNODES" \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RDZV_ID:-gpm}" \
  --rdzv-conf "join_timeout=$wait,read_timeout=$wait${NODE_RANK:+,is_host=$((NODE_RANK == 0))}" \
  ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} "${TRAIN[@]}"
