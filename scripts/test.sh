#!/usr/bin/env bash
# Runs the tests on two workers: bash scripts/test.sh [arguments of pytest]
# The virtual environment VENV (.venv) is made where there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

# One thread a worker: two that share their cores slow each other down. Each takes tests that follow one another, which share fixtures.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n 2 --dist worksteal "$@"
