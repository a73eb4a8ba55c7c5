"""The doctor's bytes against those that DDP and DeepSpeed hold."""

import json

import pytest

from nar_t2i.training.memory import STAGES, Trained, held
from tests.cluster.test_resume import fit, went_well

MEASURE = json.dumps([{"class_path": "tests.cluster.measure.Held"}])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", STAGES)
def test_weights_and_optimizer_bytes_are_exact(tmp_path, strategy, precision, ranks=2):
    went_well(fit(tmp_path, ranks, strategy, f"--trainer.callbacks={MEASURE}", f"--trainer.precision={precision}",
                  "--trainer.max_steps=2"))  # fmt: skip
    found = [json.loads((tmp_path / f"run/held-{rank}.json").read_text()) for rank in range(ranks)]
    total = sum(map(sum, found[0]["groups"]))
    trained = Trained(found[0]["groups"], [found[0]["frozen"]] if found[0]["frozen"] else [], 0, 8 * total, 4 * total)
    expected = held(trained, ranks, STAGES[strategy], "16" in precision)
    for rank in found:
        assert (rank["weights"], rank["optimizer"]) == (expected.weights, expected.optimizer)
    # The average is kept of what a rank has, without padding.
    assert max(rank["average"] for rank in found) <= expected.average
    assert sum(rank["average"] for rank in found) == 4 * total * (ranks if strategy == "ddp" else 1)


@pytest.mark.parametrize(("stage", "precision"), [(2, "bf16-mixed"), (3, "32-true")])
def test_frozen_weights_are_counted_too(tmp_path, stage, precision):
    fault = json.dumps([{"class_path": "tests.cluster.measure.Frozen", "init_args": {"size": 500_001}},
                        {"class_path": "tests.cluster.measure.Held"}])  # fmt: skip
    went_well(fit(tmp_path, 2, f"deepspeed_stage_{stage}", f"--trainer.callbacks={fault}", f"--trainer.precision={precision}",
                  "--trainer.max_steps=2"))  # fmt: skip
    found = json.loads((tmp_path / "run/held-0.json").read_text())
    assert found["frozen"] == 500_001
    total = sum(map(sum, found["groups"]))
    expected = held(Trained(found["groups"], [500_001], 0, 8 * total, 4 * total), 2, stage, "16" in precision)
    assert (found["weights"], found["optimizer"]) == (expected.weights, expected.optimizer)
