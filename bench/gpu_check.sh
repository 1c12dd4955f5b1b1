#!/usr/bin/env bash
# Checks this checkout on a machine with a GPU and writes one JSON: kernel tests on the device, microbenchmarks with the
# share of the limit, 20 fine-tuning steps, a PPO iteration and generation beside the CPU's. Runs from anywhere, needs
# what `make test` installs (or PYTHON with torch, triton and pytest), downloads nothing by itself.
#
#   bench/gpu_check.sh [--dry] [--out FILE.json] [--minutes N]
#
# --dry goes through everything on a CPU, small and in Triton's interpreter: what a machine without a GPU can prove of it.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
[ -x "$PYTHON" ] || PYTHON="$(command -v python3)"
exec "$PYTHON" -m bench.gpu_check "$@"
