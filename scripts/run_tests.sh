#!/usr/bin/env bash
# Check the code and run all tests, in an environment made on the spot if none is active. Arguments go to pytest.
#
#   bash scripts/run_tests.sh -k score -x -n 0
#
# Two test files run side by side; -n 0 runs one after the other, as debuggers want it.
set -euo pipefail
ALSO_NEEDED="deepspeed scipy sentencepiece trl pytest fastapi uvicorn prometheus_client pytest_timeout xdist hypothesis peft wandb ruff nbclient ipykernel"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
python -m ruff check .
exec python -m pytest -n 2 --dist loadfile "$@"
