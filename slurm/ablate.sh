#!/usr/bin/env bash
# Train several recipes, one array task each, at most AT_ONCE (4) of them at a time:
#
#   AT_ONCE=8 slurm/ablate.sh [option of sbatch …] RECIPE…
#
# Everything that starts with a dash, and the word after it where it has no "=", goes to sbatch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

options=() recipes=()
while [ $# -gt 0 ]; do
  case $1 in
    -*=*) options+=("$1") ;;
    -*) options+=("$1" "${2:?$1 needs a value}"); shift ;;
    *) recipes+=("$1") ;;
  esac
  shift
done
[ ${#recipes[@]} -gt 0 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
for recipe in "${recipes[@]}"; do
  [ -f "$recipe" ] || { echo "ablate.sh: there is no recipe $recipe" >&2; exit 2; }
done
# Recipes inherit run_dir, and two runs in one folder would be one.
python=${NAR_T2I_PYTHON:-.venv/bin/python}
folders=$(for recipe in "${recipes[@]}"; do
  "$python" -m nar_t2i fit --config "$recipe" --print_config | sed -n 's/^run_dir: *//p'
done)
twice=$(sort <<<"$folders" | uniq -d)
[ -z "$twice" ] || { echo "ablate.sh: several recipes have the run_dir $twice; give each its own" >&2; exit 2; }
exec sbatch --array="0-$((${#recipes[@]} - 1))%${AT_ONCE:-4}" --output="%x-%A_%a.log" "${options[@]}" \
  slurm/train.sh --one-of "${recipes[@]}"
