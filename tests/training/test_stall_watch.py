"""The watch over stalls is for ranks that hang, not for work that takes long before training."""

import os
import subprocess
import sys

import pytest

PROGRAM = """if True:
    import sys, time
    from nar_t2i.liveness import going_on
    from nar_t2i.training.preemption import StallWatch
    watch = StallWatch(0.1)  # six seconds, of which a busy machine may be away some
    watch.setup(None, None, "fit")
    end = time.monotonic() + 8
    while time.monotonic() < end:
        time.sleep(0.05)
        if sys.argv[1] == "tells":
            going_on()
    watch.teardown(None, None, "fit")
    time.sleep(7)  # nothing is watched any more
"""


@pytest.mark.parametrize(("how", "status"), [("tells", 0), ("is silent", 1)])
def test_what_says_that_it_goes_on_is_not_ended(how, status):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stderr
    assert ("Timeout (0:00:06" in done.stderr) == bool(status)
