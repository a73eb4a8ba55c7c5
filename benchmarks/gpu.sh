#!/usr/bin/env bash
# All that is measured on a CUDA GPU, in under ten minutes on an H200:
#
#   benchmarks/gpu.sh [OUT]        # default: docs/results/decoding
#
# decoding.py: latency of Emage and its autoregressive twin, with and without CUDA graphs and torch.compile.
# memory.py: the doctor's estimate of training memory beside what a GPU really holds (docs/results/memory.json).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-docs/results/decoding} python=${NAR_T2I_PYTHON:-python}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv > "$out/nvidia-smi.csv" || true
# One that fails does not keep the others from running.
status=0
"$python" benchmarks/decoding.py --batch 1 16 --out "$out/gpu.json" || status=1
"$python" benchmarks/decoding.py --batch 1 --compile --twin-repeats 1 --out "$out/gpu-compiled.json" || status=1
"$python" benchmarks/memory.py || status=1
exit "$status"
