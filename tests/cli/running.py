"""The command in this process, and what it leaves."""

import csv
from pathlib import Path

from nar_t2i.cli import main
from nar_t2i.training import checkpoints

ROOT = Path(__file__).parents[2]
RECIPE = """
seed_everything: 1
model:
  class_path: tests.cli.toys.Model
  init_args:
    network: {class_path: tests.cli.toys.Network, init_args: {width: 3}}
    optimizer: {learning_rate: 0.01, warmup_steps: 2}
data: {class_path: tests.cli.toys.Data}
trainer:
  max_steps: 6
  accelerator: cpu
  log_every_n_steps: 1
  limit_val_batches: 1
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
"""


def fit(*arguments, verb="fit", recipe="toy.yaml"):
    return main([verb, "--config", recipe, *arguments])


def weights(path):
    return checkpoints.read(Path(path).resolve())["state_dict"]


def metrics(folder):
    with open(folder / "run/metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row["loss"]]  # without validation's rows
