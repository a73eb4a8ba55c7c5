# Sourced by the other scripts, with $root and `fail`: how Python is run, and what a job does at its begin and its end.

REQUEUE=85  # what a run ends with that is to be started again; see nar_t2i/errors.py

# python_of FOLDER…: sets the words $python, in a container with these folders in it where NAR_T2I_CONTAINER names one.
python_of() {
  local folders
  printf -v folders '%s,' "$@"
  if [ -n "${NAR_T2I_CONTAINER:-}" ]; then
    [ -e "$NAR_T2I_CONTAINER" ] || fail "NAR_T2I_CONTAINER: there is no $NAR_T2I_CONTAINER"
    python=(apptainer exec --nv --bind "${folders%,}" --pwd "$root" "$NAR_T2I_CONTAINER" "${NAR_T2I_PYTHON:-python3}")
  else
    python=("${NAR_T2I_PYTHON:-$root/.venv/bin/python}")
  fi
}

# seconds_of: a time as Slurm writes it, on standard input ([days-]hours:minutes:seconds); a large number where there is no limit.
seconds_of() {
  awk -F '[:-]' '
    /[0-9]/ {
      n = 60 * ($(NF - 1) + 0) * (NF > 1) + $NF
      if (NF > 2) n += 3600 * $(NF - 2)
      if (NF > 3) n += 86400 * $1
    }
    END { print n ? n : 10 ^ 9 }
  '
}

# run_dir_of: of the resolved recipe on its standard input.
run_dir_of() { "${python[@]}" -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["run_dir"])'; }

# make_folder FOLDER [NAME]: with those above it. NAME: what a message calls it, where that is not FOLDER.
make_folder() {
  local message
  message=$(mkdir -p "$1" 2>&1) || fail "${2:-$1} cannot be made: ${message#mkdir: }"
}

# use_cores_of_task: srun does not give its tasks the cores that --cpus-per-task asked sbatch for, unless it is told again.
use_cores_of_task() {
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
}

# requeue SCRIPT: queues this job, or this task of an array, again. SCRIPT: the name in front of its line in the log.
requeue() {
  local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  echo "$1: queueing ${job:-$SLURM_JOB_ID} again"
  scontrol requeue "${job:-$SLURM_JOB_ID}"
  sleep 600  # Slurm ends this script
}
