#!/usr/bin/env bash
# All benchmarks (make bench), into docs/results/bench or another folder:
#
#   benchmarks/all.sh [OUT]
#
# With a CUDA GPU gpu.sh's, in full; without one the same in small, in a quarter of an hour on two idle cores. Then what needs no
# GPU: ranks over gloo and the data path. benchmarks/page.py renders what they write.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-docs/results/bench} python=${NAR_T2I_PYTHON:-python}
[ -n "${NAR_T2I_PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
mkdir -p "$out"
export NAR_T2I_PYTHON=$python PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
status=0
# One that fails does not keep the others from running.
measure() { echo "== $*"; timeout --kill-after=10 "$1" "$python" "${@:2}" || { echo "failed: ${*:2}" >&2; status=1; }; }
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  benchmarks/gpu.sh "$out" || status=1
else
  compile=$(command -v c++ g++ clang++ > /dev/null || echo --no-compile)
  # Each has its minutes, after which it begins nothing more; what it left out stands in its file, or is a row that is missing.
  measure 330 benchmarks/peers.py --small --minutes 4 --out "$out/peers-cpu.json"
  # As wide as aMUSEd is, two of its layers: where matrix products are what takes the time.
  measure 240 benchmarks/peers.py --small --geometry 256-shallow --systems amused --batch 1 --minutes 3 \
    --out "$out/peers-cpu-wide.json"
  measure 120 benchmarks/decoding.py --small --batch 1 --repeats 10 --twin-repeats 2 --minutes 0.7 --out "$out/decoding-cpu.json"
  measure 240 benchmarks/training.py --small $compile --minutes 2.5 --out "$out/training-cpu.json"
fi
measure 240 benchmarks/scaling.py --out "$out/scaling.json"
measure 240 benchmarks/data.py --rounds 3 --out "$out/data.json"
exit "$status"
