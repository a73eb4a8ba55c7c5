# Sourced by the other scripts, with $root and `fail`: how Python is run.

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
seconds_of() { awk -F '[:-]' '/[0-9]/ { n = 60 * ($(NF - 1) + 0) * (NF > 1) + $NF; if (NF > 2) n += 3600 * $(NF - 2); if (NF > 3) n += 86400 * $1; } END { print n ? n : 10 ^ 9 }'; }

# run_dir_of: of the resolved recipe on its standard input.
run_dir_of() { "${python[@]}" -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["run_dir"])'; }
