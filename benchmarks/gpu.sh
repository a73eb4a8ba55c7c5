#!/usr/bin/env bash
# All that is measured on a CUDA GPU, in under ten minutes on an H100 or H200:
#
#   benchmarks/gpu.sh [OUT]        # default: docs/results/bench
#   MEMORY=1 benchmarks/gpu.sh     # memory.py as well, which takes minutes more
#
# peers.py:    diffusers' aMUSEd and ours on the same weights, at 256 px in bf16 and fp32, at batch 1, 8 and 64, plainly launched
#              and as a graph; in bf16 at batch 1 both compiled; our parallel network, its twin, `generate` on a Llama of their
#              size; aMUSEd at 512 px.
# decoding.py: Emage from the text to the image, its decoder with torch.compile.
# training.py: steps of the 346M recipe at the largest micro-batch, and what each of its options brings.
# step_time.py: where the time of such a step goes, by torch's profiler.
# matvec.py:   what a pass of one token could take at best.
# memory.py:   the doctor's estimate of training memory beside what a GPU really holds (docs/results/memory.json).
#
# Each has its minutes, after which it begins nothing more; what it left out or what failed stands in its file, which is written
# after every row. A measurement that has begun ends, but for the seconds in front, after which all is broken off: they sum up to
# less than ten minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-docs/results/bench} python=${NAR_T2I_PYTHON:-python}
[ -n "${NAR_T2I_PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if told=$(nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv); then
  printf '%s\n' "$told" > "$out/nvidia-smi.csv"
fi
status=0
# One that fails does not keep the others from running. Where a compiler hangs, the others still get their time.
measure() { timeout --kill-after=2 "$1" "$python" "${@:2}" || { echo "failed: ${*:2}" >&2; status=1; }; }
amused=(benchmarks/peers.py --systems amused --dtypes)
measure 135 benchmarks/training.py --minutes 1.9 --out "$out/training.json"
measure 38 benchmarks/step_time.py --out "$out/step-time.json"
measure 92 "${amused[@]}" bf16 fp32 --geometry 256 --batch 1 8 64 --repeats 6 --minutes 1.1 --out "$out/peers-256.json"
measure 90 "${amused[@]}" bf16 --geometry 256 --batch 1 --repeats 6 --compile --minutes 1 --out "$out/peers-256-compiled.json"
measure 116 benchmarks/peers.py --systems size --batch 1 16 --repeats 10 --twin-repeats 1 --minutes 1.55 --out "$out/peers-size.json"
measure 40 benchmarks/decoding.py --batch 1 16 --compile --twin-repeats 0 --minutes 0.3 --out "$out/decoding-compiled.json"
measure 33 benchmarks/matvec.py --repeats 30 --minutes 0.2 --out "$out/matvec.json"
measure 38 "${amused[@]}" bf16 fp32 --geometry 512 --batch 1 8 --repeats 5 --minutes 0.28 --out "$out/peers-512.json"
[ -z "${MEMORY:-}" ] || "$python" benchmarks/memory.py || status=1
exit "$status"
