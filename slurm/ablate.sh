#!/usr/bin/env bash
# Several recipes, one array task each, at most AT_ONCE (4) of them at a time:
#
#   AT_ONCE=8 slurm/ablate.sh [option of sbatch …] RECIPE…
#   AT_ONCE=8 slurm/ablate.sh [option of sbatch …] RECIPE… -- --scale small --seeds 3 --out runs/ablation
#
# The first line trains each recipe as slurm/train.sh does. The second runs `nar-t2i ablate` with the options after the
# two dashes: a task trains one run, on one device, and judges all that draws with it; the last one to end writes the table.
# Everything that starts with a dash, and the word after it where it has no "=", goes to sbatch.
#
#SBATCH --job-name=nar-t2i-ablate
#SBATCH --ntasks=1
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
set -euo pipefail
readonly REQUEUE=85  # what a run ends with that is to be started again; see nar_t2i/training/preemption.py

if [ "${1:-}" = --task ]; then  # this is the job
  shift
  cd "$SLURM_SUBMIT_DIR"
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  command=("${NAR_T2I_PYTHON:-$PWD/.venv/bin/python}")
  if [ -n "${NAR_T2I_CONTAINER:-}" ]; then
    command=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" "$NAR_T2I_CONTAINER" "${NAR_T2I_PYTHON:-python3}")
  fi
  [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ] || { echo "ablate.sh: started 50 times and not finished; not queued again" >&2; exit 2; }
  echo "ablate.sh: task $SLURM_ARRAY_TASK_ID of job $SLURM_ARRAY_JOB_ID, start ${SLURM_RESTART_COUNT:-0}"
  status=0
  # Without SLURM_NTASKS Lightning looks for no other ranks.
  srun --ntasks=1 env -u SLURM_NTASKS "${command[@]}" -m nar_t2i ablate --task "$SLURM_ARRAY_TASK_ID" "$@" || status=$?
  if [ "$status" -eq "$REQUEUE" ]; then
    echo "ablate.sh: queueing ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID again"
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    sleep 600  # Slurm ends this script
  fi
  exit "$status"
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
options=() recipes=() ablation=() judged=false
while [ $# -gt 0 ]; do
  case $1 in
    --) judged=true; shift; ablation=("$@"); break ;;
    -*=*) options+=("$1") ;;
    -*) options+=("$1"); if [ $# -gt 1 ] && [ "$2" != -- ]; then options+=("$2"); shift; fi ;;
    *) recipes+=("$1") ;;
  esac
  shift
done
[ ${#recipes[@]} -gt 0 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
python=${NAR_T2I_PYTHON:-.venv/bin/python}

if $judged; then
  tasks=$("$python" -m nar_t2i ablate "${recipes[@]}" ${ablation[@]+"${ablation[@]}"} --count)
  exec sbatch --array="0-$((tasks - 1))%${AT_ONCE:-4}" ${options[@]+"${options[@]}"} slurm/ablate.sh --task "${recipes[@]}" ${ablation[@]+"${ablation[@]}"}
fi
for recipe in "${recipes[@]}"; do
  [ -f "$recipe" ] || { echo "ablate.sh: there is no recipe $recipe" >&2; exit 2; }
done
# Recipes inherit run_dir, and two runs in one folder would be one.
folders=$(for recipe in "${recipes[@]}"; do
  "$python" -m nar_t2i fit --config "$recipe" --print_config | "$python" -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["run_dir"])'
done)
twice=$(sort <<<"$folders" | uniq -d)
[ -z "$twice" ] || { echo "ablate.sh: several recipes have the run_dir $twice; give each its own" >&2; exit 2; }
exec sbatch --job-name=nar-t2i --array="0-$((${#recipes[@]} - 1))%${AT_ONCE:-4}" --output="%x-%A_%a.log" ${options[@]+"${options[@]}"} \
  slurm/train.sh --one-of "${recipes[@]}"
