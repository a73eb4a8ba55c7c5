#!/usr/bin/env bash
# Trials of a W&B sweep, one a task of a Slurm array, on one node each:
#
#   wandb sweep recipes/sweeps/learning.yaml                        # which tells ENTITY/PROJECT/SWEEP_ID
#   sbatch --array=0-8%3 slurm/sweep.sh ENTITY/PROJECT/SWEEP_ID     # nine trials, three at once
#
# Submit it from the project's folder; options of sbatch win over the ones below. Before its time is over a trial saves
# itself, its task is queued again, and W&B, which knows it as preempted, hands it out again: it goes on in its own
# folder. A sweep's command may ask for several GPUs with --trainer.devices.
#
# NAR_T2I_PYTHON     the Python to run; `wandb` must lie beside it  (default: .venv/bin/python of the project)
#
#SBATCH --job-name=nar-t2i-sweep
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
set -euo pipefail

fail() { echo "sweep.sh: $*" >&2; exit 2; }

[ -n "${SLURM_JOB_ID:-}" ] || fail "submit it: sbatch --array=0-8%3 slurm/sweep.sh ENTITY/PROJECT/SWEEP_ID"
[ $# -eq 1 ] || fail "name one sweep: ENTITY/PROJECT/SWEEP_ID"
[ -z "${NAR_T2I_CONTAINER:-}" ] ||
  fail "a sweep's agent runs outside of containers; unset NAR_T2I_CONTAINER, and name a Python with NAR_T2I_PYTHON"
root=${SLURM_SUBMIT_DIR}
[ -d "$root/nar_t2i" ] || fail "submit it from the project's folder: there is no nar_t2i in $root"
cd "$root"
. slurm/python.sh

python=${NAR_T2I_PYTHON:-$root/.venv/bin/python}
export PATH="$(dirname "$python"):$PATH" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
use_cores_of_task
make_folder runs/.slurm
export NAR_T2I_PREEMPTED=$root/runs/.slurm/$SLURM_JOB_ID.preempted  # written by a trial that leaves to go on later
rm -f "$NAR_T2I_PREEMPTED"

# The agent outlives the signal, which is for its trial. Without SLURM_NTASKS Lightning starts a trial's ranks itself.
one_trial='
  trap "pkill -USR1 -P \$agent || true" USR1
  (trap "" USR1; unset SLURM_NTASKS; exec wandb agent --count 1 "$1") &
  agent=$!
  while status=0; wait "$agent" || status=$?; kill -0 "$agent" 2>/dev/null; do :; done
  exit "$status"
'
echo "sweep.sh: task $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, a trial of $1"
srun --export=ALL --ntasks=1 bash -c "$one_trial" trial "$1"
if [ -e "$NAR_T2I_PREEMPTED" ]; then
  rm "$NAR_T2I_PREEMPTED"
  requeue sweep.sh
fi
