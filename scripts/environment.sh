# Sourced by the launchers: an environment in which everything can be imported, and what this machine is.
#
# Uses the active Python if it has all packages; otherwise makes ROOT/.venv and installs requirements.txt there, once.
# Sets: PATH (the environment), PYTHONPATH (this checkout), GPUS (their number), NPROC, LAUNCH (the start of a command).
# Reads: PYTHON (which interpreter makes .venv, default python3), NPROC, ALSO_NEEDED (more packages: deepspeed to train),
# GPUS_PER_HOST (where the processes will run on other machines than this).

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

has_everything() {
  local needed=(torch transformers safetensors datasets matplotlib tqdm ${ALSO_NEEDED:-})
  "$1" - "${needed[@]}" <<'PY' 2>/dev/null
import sys
from importlib.util import find_spec
sys.exit(any(find_spec(name) is None for name in sys.argv[1:]) or sys.version_info < (3, 10))
PY
}

make_environment() {
  local python=${PYTHON:-python3} wanted
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    { echo "error: '$python' is missing or older than Python 3.11; name one with PYTHON=/path/to/python3" >&2; exit 2; }
  wanted=$(cksum < "$ROOT/requirements.txt")
  exec 9> "$ROOT/.venv.lock"
  flock 9 # a second start waits for the first one's installation
  if [[ "$(cat "$ROOT/.venv/installed" 2>/dev/null)" != "$wanted" ]]; then
    echo "Installing into $ROOT/.venv (once, a few minutes) ..." >&2
    "$python" -m venv "$ROOT/.venv" ||
      { echo "error: cannot make $ROOT/.venv; is the venv module installed (Debian: python3-venv)?" >&2; exit 2; }
    (cd "$ROOT" && .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt) ||
      { echo "error: installing requirements.txt failed; run this again to continue" >&2; exit 2; }
    echo "$wanted" > "$ROOT/.venv/installed"
    echo "Installed. To use it in your own shell: source .venv/bin/activate" >&2
  fi
  exec 9>&-
  source "$ROOT/.venv/bin/activate"
}

if ! { command -v python > /dev/null && has_everything python; }; then
  make_environment
fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

GPUS=${GPUS_PER_HOST:-$(python -c 'import torch; print(torch.cuda.device_count())')}
NPROC=${NPROC:-$((GPUS > 0 ? GPUS : 1))}
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || { echo "error: NPROC=$NPROC is no number of processes" >&2; exit 2; }
if ((GPUS == 0)); then
  export DS_ACCELERATOR=cpu
  # glibc gives large temporaries back to the kernel after every operation; keeping them is several times faster.
  export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8589934592}
  # Threads that wait by spinning slow each other down tenfold as soon as something else runs on the machine.
  # A few microseconds of it, before they sleep, save more than they cost (about a tenth of a step; 4 % when busy).
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-5000}
  if ((NPROC > 1)); then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + NPROC - 1) / NPROC))}
  fi
fi
# In a Slurm step of several tasks a bare process would wait for the other tasks; here each task is a run of its own.
if ((NPROC > 1)) || [[ ${SLURM_STEP_NUM_TASKS:-1} != 1 ]]; then
  LAUNCH=(python "$ROOT/scripts/launch_node.py" --nproc "$NPROC")
else
  LAUNCH=(python)
fi
