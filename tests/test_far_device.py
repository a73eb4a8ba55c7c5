"""Training and drawing on a device that is not the host: no operation mixes the two, and the numbers are those of the CPU."""

import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from tests import far_cases, far_device
from tests.cluster.forks import ROOT

# The one that is installed here does, so that nothing is left out unseen.
OLDER = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
pytestmark = pytest.mark.skipif(
    OLDER and not far_device.POSSIBLE, reason="this older torch knows no devices that are written in Python"
)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What went wrong in each case, and what was said of those that did not come to an end."""
    folder = tmp_path_factory.mktemp("far")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "TOKENIZERS_PARALLELISM": "false"}
    with (
        open(folder / "out", "w") as out,
        open(folder / "err", "w") as err,
        suppress(subprocess.TimeoutExpired),
    ):  # which leaves the rest out
        subprocess.run([sys.executable, "-m", "tests.far_cases"], cwd=folder, env=environment, stdout=out, stderr=err, timeout=900)
    lines = (folder / "out").read_text().splitlines()
    found = [json.loads(line.removeprefix(far_cases.ENDED)) for line in lines if line.startswith(far_cases.ENDED)]
    return dict(found), (folder / "err").read_text()[-2000:]


@pytest.mark.parametrize("name", far_cases.CASES)
def test_on_the_device_as_on_the_host(ended, name):
    problems, told = ended
    assert name in problems, told
    assert problems[name] is None, problems[name]


def test_what_mixes_devices_is_seen():
    mixed = (
        "import torch; from tests import far_device; far_device.register()\n"
        "with far_device.present():\n"
        "    x = torch.ones(3).to('far')\n"
        "    assert (x * 2).device.type == 'far' and (x + torch.tensor(1.0)).sum().item() == 6\n"
        "    try: torch.nn.functional.dropout(x)\n"
        "    except RuntimeError as error: assert 'draws by itself' in str(error)\n"
        "    else: assert False\n"
        "    x + torch.ones(3)"
    )
    done = subprocess.run([sys.executable, "-c", mixed], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "aten.add.Tensor: tensors on far and on cpu, of shapes [(3,)] and [(3,)]" in done.stderr
