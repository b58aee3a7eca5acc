# Sourced by the launchers: an environment in which everything can be imported, and how to start a script here.
#
# Uses the active Python if it has all packages; otherwise makes ROOT/.venv and installs requirements.txt there, once.
# Reads: PYTHON (which makes .venv, default python3), NPROC (processes, default one per GPU), RESTARTS (how often a run
# whose process died starts again, default 0), ALSO_NEEDED (more packages). Sets: PATH, PYTHONPATH, GPUS, NPROC, LAUNCH.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "error: $*" >&2
  exit 2
}

has_everything() {
  python - torch transformers safetensors datasets matplotlib tqdm ${ALSO_NEEDED:-} <<'PY' 2> /dev/null
import sys
from importlib.util import find_spec
sys.exit(any(find_spec(name) is None for name in sys.argv[1:]) or sys.version_info < (3, 10))
PY
}

make_environment() {
  exec 9> "$ROOT/.venv.lock"
  flock 9 # a second start waits for the first one's installation
  if ! cmp -s "$ROOT/requirements.txt" "$ROOT/.venv/installed"; then
    echo "Installing into $ROOT/.venv (once, a few minutes) ..." >&2
    "${PYTHON:-python3}" -m venv "$ROOT/.venv" ||
      fail "cannot make $ROOT/.venv: name a Python of at least 3.11 with its venv module by PYTHON=/path/to/python3"
    # --no-compile: Python compiles what it imports, when it does, and that is a part of what is installed.
    (cd "$ROOT" && .venv/bin/python -m pip install --no-compile --quiet --disable-pip-version-check -r requirements.txt) ||
      fail "installing requirements.txt failed; run this again to continue"
    cp "$ROOT/requirements.txt" "$ROOT/.venv/installed"
  fi
  exec 9>&-
  source "$ROOT/.venv/bin/activate"
}

has_everything || make_environment
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
eval "$(python -P "$ROOT/general_preference/cpu_settings.py")" # GPUS, and what libraries read on CPUs
((GPUS > 0)) || export DS_ACCELERATOR=cpu # keeps DeepSpeed from probing for other devices; the scripts set the rest
NPROC=${NPROC:-$((GPUS > 0 ? GPUS : 1))} RESTARTS=${RESTARTS:-0}
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$NPROC is no number of processes"
[[ $RESTARTS =~ ^[0-9]+$ ]] || fail "RESTARTS=$RESTARTS is no number"
if ((GPUS == 0 && NPROC > 1)); then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + NPROC - 1) / NPROC))}
fi
LAUNCH=(python) # one process needs no launcher
if ((NPROC > 1 || RESTARTS > 0)); then
  LAUNCH+=("$ROOT/scripts/launch.py" --nproc-per-node "$NPROC" --max-restarts "$RESTARTS")
fi
