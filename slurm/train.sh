#!/usr/bin/env bash
# Train a recipe on a Slurm cluster:
#
#   sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 slurm/train.sh recipes/NAME.yaml [--KEY=VALUE …]
#
# Submit it from the project's folder; options of sbatch win over the ones below. One task is one rank, on one GPU.
# Before its time is over, or when it is told to (SIGUSR1), the run saves itself and is queued again; submitting the same
# command again goes on, too. A run that fails is not queued again, and neither is one that was cancelled.
#
# NAR_T2I_PYTHON     the Python to run          (default: .venv/bin/python of the project; in a container, its python3)
# NAR_T2I_CONTAINER  an Apptainer image to run it in, which holds what the package depends on (default: none). The project and the
#                    run are there; name what else a recipe reads in APPTAINER_BIND
#
#SBATCH --job-name=nar-t2i
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
set -euo pipefail

fail() { echo "train.sh: $*" >&2; exit 2; }

[ -n "${SLURM_JOB_ID:-}" ] || fail "submit it: sbatch slurm/train.sh RECIPE [--KEY=VALUE …]"
root=${SLURM_SUBMIT_DIR}
[ -d "$root/nar_t2i" ] || fail "submit it from the project's folder: there is no nar_t2i in $root"
cd "$root"
if [ "${1:-}" = --one-of ]; then  # an array of recipes: see ablate.sh
  shift
  recipes=("$@")
  set -- "${recipes[${SLURM_ARRAY_TASK_ID:?--one-of is for array jobs}]}"
fi
[ $# -ge 1 ] || fail "name a recipe: sbatch slurm/train.sh RECIPE [--KEY=VALUE …]"
recipe=$1
shift

pointer=runs/.slurm/$SLURM_JOB_ID  # to its run, once it has one
# What is edited while the job waits to go on changes nothing: recipe and code are those of its first start. A pointer that a first
# start finds is another job's, of a Slurm that counts its jobs anew.
goes_on=false helper=slurm/python.sh
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f "$pointer" ]; then
  goes_on=true
  kept=$(cat "$pointer")/slurm/$SLURM_JOB_ID/python.sh
  [ ! -f "$kept" ] || helper=$kept
fi
. "$helper"
python_of "$root"

# One task a rank. Where GPUs were asked for, there must be as many tasks.
tasks=${SLURM_NTASKS_PER_NODE:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
[ "$gpus" -eq 0 ] || [ "$gpus" -eq "$tasks" ] ||
  fail "$gpus GPUs and $tasks tasks on a node: ask for --gpus-per-node=N --ntasks-per-node=N"
# By these srun would show each rank one GPU alone, where it takes that of its number.
unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
for setting; do
  case $setting in
    --trainer.devices*|--trainer.num_nodes*) fail "${setting%%=*}: the job says it, by --nodes and --ntasks-per-node" ;;
  esac
done
settings=("--trainer.num_nodes=$SLURM_JOB_NUM_NODES" "--trainer.devices=$tasks")

if ! $goes_on; then
  resolved=$("${python[@]}" -m nar_t2i fit --config "$recipe" "${settings[@]}" "$@" --print_config)
  run=$(run_dir_of <<<"$resolved")
  [ "${run:0:1}" = / ] || run=$root/$run
  snapshot=$run/slurm/$SLURM_JOB_ID
  make_folder "$snapshot" "$run"
  make_folder runs/.slurm
  cp slurm/python.sh "$snapshot"
  # Not what another task is just writing. Status 1 of tar: a folder got another entry meanwhile.
  { tar --exclude=__pycache__ -cf - nar_t2i || [ $? -eq 1 ]; } | tar -xf - -C "$snapshot"
  git rev-parse HEAD 2>/dev/null | sed "$(git diff --quiet HEAD 2>/dev/null || echo 's/$/+changes/')" > "$snapshot/commit" || true
  printf '%s\n' "$resolved" > "$snapshot/recipe.yaml"
  printf '%s\n' "$run" > "$pointer.part"
  mv "$pointer.part" "$pointer"
fi
run=$(cat "$pointer")
snapshot=$run/slurm/$SLURM_JOB_ID
python_of "$root" "$run"

# Without PYTHONSAFEPATH the folder that the job stands in would come before the snapshot.
export PYTHONPATH="$snapshot:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID + 97 * ${SLURM_RESTART_COUNT:-0}) % 20000))}
use_cores_of_task
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}

# A ckpt_path of the recipe is where the job begins; once it has a checkpoint of its own, it goes on from that.
again=
[ ! "$run/checkpoints/last.ckpt/manifest.json" -nt "$snapshot/recipe.yaml" ] || again=--ckpt_path=null

echo "train.sh: job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, $SLURM_JOB_NUM_NODES nodes × $tasks ranks, $run"
limit=$({ squeue --noheader --jobs "$SLURM_JOB_ID" --format %l || true; } | seconds_of)
before=$(readlink "$run/checkpoints/last.ckpt" || true)
status=0
# Ranks that leave with a status of their own do so within moments of each other, but for the first, which tells W&B; after four
# minutes, of the five that Slurm gives, the rest is stuck.
srun --export=ALL --kill-on-bad-exit=0 --wait=240 --ntasks-per-node="$tasks" \
  "${python[@]}" -m nar_t2i fit --config "$snapshot/recipe.yaml" ${again:+"$again"} || status=$?

if [ "$status" -eq "$REQUEUE" ]; then
  # A run that gets no further between two requeues never would; one that was told before it had begun may.
  if [ "$(readlink "$run/checkpoints/last.ckpt" || true)" = "$before" ]; then
    if [ "$limit" -le 300 ]; then
      fail "told to leave before a step was finished; not queued again." \
        "It is told 300 s before its end, if --signal=USR1@SECONDS says nothing else, and has $limit s"
    fi
    if [ -e "$snapshot/no-step" ] && [ "$(cat "$snapshot/no-step")" = "$before" ]; then
      fail "no step was finished in two starts; not queued again"
    fi
    printf '%s' "$before" > "$snapshot/no-step"
  fi
  requeue train.sh
fi
exit "$status"
