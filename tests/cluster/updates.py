"""On each rank: train a few steps under every setting that was asked for, and write the weights that come out.

updates.py OUT SETTING…, a setting being strategy:micro-batches a step:clip norm:optimizer, and, where it is not a masked
generator's training, a function of tests.cluster.tiny that says what it is
"""

import os
import sys

import torch

from nar_t2i.training import zero
from nar_t2i.training.optim import OptimizerConfig
from tests.cluster import tiny

STEPS = 5


def main() -> None:
    out, *settings = sys.argv[1:]
    ranks = int(os.environ["WORLD_SIZE"])
    zero.register()
    results = {}
    for setting in settings:
        strategy, accumulation, clip, optimizer, *what = setting.split(":")
        config = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, eps=1e-3, clip_norm=float(clip))
        module = tiny.Generator(sgd=optimizer == "sgd", optimizer=config, **(getattr(tiny, what[0])() if what else {}))
        trainer = tiny.trainer(strategy, ranks, STEPS, default_root_dir=f"{out}.run")
        trainer.fit(module, datamodule=tiny.data(tiny.GLOBAL_BATCH // (ranks * int(accumulation))))
        averages = {name: value.clone() for name, value in module.ema.average.items()}
        with zero.gathered(module):
            weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
        with module.ema.applied(module), zero.gathered(module):
            applied = {name: value.detach().clone() for name, value in module.state_dict().items()}
        results[setting] = {"weights": weights, "applied": applied, "averages": averages}
    if trainer.is_global_zero:
        torch.save(results, out)


main()
