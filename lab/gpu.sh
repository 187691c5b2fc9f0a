#!/usr/bin/env bash
# Everything that only a GPU can show, in at most eight minutes: lab/gpu.py says what.
#   bash lab/gpu.sh               on a machine with a GPU
#   bash lab/gpu.sh --rehearse    the same at toy size on a CPU
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH=$root exec python3 -m lab.gpu "$@"
