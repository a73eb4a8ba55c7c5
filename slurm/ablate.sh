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
exec sbatch --array="0-$((${#recipes[@]} - 1))%${AT_ONCE:-4}" --output="%x-%A_%a.log" "${options[@]}" \
  slurm/train.sh --one-of "${recipes[@]}"
