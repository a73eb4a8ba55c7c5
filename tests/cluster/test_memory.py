"""The doctor's bytes against those that DDP and DeepSpeed hold."""

import json

import pytest

from nar_t2i.training.memory import STAGES, held
from tests.cluster.test_resume import fit, went_well

MEASURE = json.dumps([{"class_path": "tests.cluster.measure.Held"}])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", STAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_and_optimizer_bytes_are_exact(tmp_path, ranks, strategy, precision):
    went_well(fit(tmp_path, ranks, strategy, f"--trainer.callbacks={MEASURE}", f"--trainer.precision={precision}",
                  "--trainer.max_steps=2"))  # fmt: skip
    found = [json.loads((tmp_path / f"run/held-{rank}.json").read_text()) for rank in range(ranks)]
    expected = held(found[0]["groups"], 0, ranks, STAGES[strategy], "16" in precision, averaged=True)
    for rank in found:
        assert (rank["weights"], rank["optimizer"]) == (expected.weights, expected.optimizer)
    # The average is kept of what a rank has, without padding.
    assert max(rank["average"] for rank in found) <= expected.average
    assert sum(rank["average"] for rank in found) == 4 * sum(map(sum, found[0]["groups"])) * (ranks if strategy == "ddp" else 1)
