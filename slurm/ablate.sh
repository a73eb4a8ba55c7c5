#!/usr/bin/env bash
# Several recipes, one array task each, at most AT_ONCE (4) of them at a time:
#
#   AT_ONCE=8 slurm/ablate.sh [option of sbatch …] RECIPE…
#   AT_ONCE=8 slurm/ablate.sh [option of sbatch …] RECIPE… -- --scale small --seeds 3 --out runs/ablation
#
# The first line trains each recipe as slurm/train.sh does. The second runs `nar-t2i ablate` with the options after the
# two dashes: a task trains one run, on one device, and judges all that draws with it; the last one to end writes the table.
# Everything that starts with a dash, and the word after it where it has no "=" and that is neither a recipe nor an option, goes to
# sbatch.
#
#SBATCH --job-name=nar-t2i-ablate
#SBATCH --ntasks=1
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
set -euo pipefail
fail() { echo "ablate.sh: $*" >&2; exit 2; }

if [ "${1:-}" = --task ]; then  # this is the job
  shift
  cd "$SLURM_SUBMIT_DIR"
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  root=$PWD
  . slurm/python.sh
  python_of "$root"
  use_cores_of_task
  [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ] || fail "started 50 times and not finished; not queued again"
  echo "ablate.sh: task $SLURM_ARRAY_TASK_ID of job $SLURM_ARRAY_JOB_ID, start ${SLURM_RESTART_COUNT:-0}"
  status=0
  # Without SLURM_NTASKS Lightning looks for no other ranks.
  srun --export=ALL --ntasks=1 env -u SLURM_NTASKS "${python[@]}" -m nar_t2i ablate --task "$SLURM_ARRAY_TASK_ID" "$@" || status=$?
  if [ "$status" -eq "$REQUEUE" ]; then
    requeue ablate.sh
  fi
  exit "$status"
fi

here=$PWD script=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$script")/.."
# absolute NAME: of a file where the command was given; a name of a shipped recipe stays.
absolute() { if [ -f "$here/$1" ]; then printf '%s\n' "$here/$1"; else printf '%s\n' "$1"; fi; }
is_recipe() {
  case $1 in
    *.yaml|*.yml) [ -f "$here/$1" ] || [ -f "$1" ] || [ -f "recipes/$1" ] ;;
    *) [ -f "recipes/$1.yaml" ] ;;
  esac
}
options=() recipes=() ablation=() judged=false
while [ $# -gt 0 ]; do
  case $1 in
    --) judged=true; shift; ablation=("$@"); break ;;
    -*=*) options+=("$1") ;;
    -*) options+=("$1"); if [ $# -gt 1 ] && [[ $2 != -* ]] && ! is_recipe "$2"; then options+=("$2"); shift; fi ;;
    *) recipes+=("$(absolute "$1")") ;;
  esac
  shift
done
[ ${#recipes[@]} -gt 0 ] || { sed -n '2,10s/^# \{0,1\}//p' "$script" >&2; exit 2; }
root=$PWD
. slurm/python.sh
python_of "$root"

if $judged; then
  tasks=$("${python[@]}" -m nar_t2i ablate "${recipes[@]}" ${ablation[@]+"${ablation[@]}"} --count)
  exec sbatch --array="0-$((tasks - 1))%${AT_ONCE:-4}" ${options[@]+"${options[@]}"} \
    slurm/ablate.sh --task "${recipes[@]}" ${ablation[@]+"${ablation[@]}"}
fi
# Recipes inherit run_dir, and two runs in one folder would be one.
folders=()
for recipe in "${recipes[@]}"; do
  resolved=$("${python[@]}" -m nar_t2i fit --config "$recipe" --print_config)
  folder=$(run_dir_of <<<"$resolved")
  folders+=("$folder")
done
twice=$(printf '%s\n' "${folders[@]}" | sort | uniq -d)
[ -z "$twice" ] || fail "several recipes have the run_dir $twice; give each its own"
exec sbatch --job-name=nar-t2i --array="0-$((${#recipes[@]} - 1))%${AT_ONCE:-4}" --output="%x-%A_%a.log" \
  ${options[@]+"${options[@]}"} slurm/train.sh --one-of "${recipes[@]}"
