"""The model of traffic against what two real ranks send, and the doctor's bytes against what they hold."""

import json
import subprocess
import sys

import pytest

from benchmarks import scaling
from benchmarks.results import ROOT
from nar_t2i.errors import UserError
from nar_t2i.training.memory import STAGES


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bytes_on_the_wire_are_the_models(tmp_path, precision):
    line = [
        sys.executable,
        ROOT / "benchmarks/scaling.py",
        "--ranks",
        "1",
        "2",
        "--precision",
        precision,
        "--out",
        tmp_path / "found.json",
    ]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {(row["ranks"], row["strategy"]): row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert set(rows) == {(count, strategy) for count in (1, 2) for strategy in STAGES}
    for (count, strategy), row in rows.items():
        for name in ("weights", "optimizer", "average"):
            assert row[f"{name}_bytes"] <= row[f"doctor_{name}_bytes"] <= row[f"{name}_bytes"] * 1.001
        if count == 1:
            assert row["sent_bytes"] < 1000
            continue
        model = scaling.payload(row["parameters"], count, strategy, precision == "bf16-mixed")
        for name in scaling.RING:  # and a few numbers: norms, overflows, buffers
            assert model.get(name, 0) <= row[f"{name}_bytes"] <= model.get(name, 0) * 1.01 + 2000
        assert row["sent_bytes"] == pytest.approx(scaling.wire(model, count, scaling.GLOO), rel=0.03)
    # The control: another strategy's bytes would not do.
    assert rows[2, "deepspeed_stage_1"]["sent_bytes"] != pytest.approx(rows[2, "ddp"]["sent_bytes"], rel=0.03)


def test_other_losses_are_refused():
    scaling.check("two", [9.0, 8.9], [9.0, 8.9], "one")
    with pytest.raises(UserError, match="two takes other losses than one"):
        scaling.check("two", [9.0, 9.0], [9.0, 8.9], "one")
    with pytest.raises(UserError, match="does not fall"):
        scaling.check("two", [9.0, 9.0], [9.0, 9.0], "one")
