"""Files of a checkpoint: what was written is known by its hash, and a disk that is full is told as such."""

import errno
from hashlib import sha256

import pytest
import torch

from nar_t2i.training.checkpoints import write_file
from tests.full_disk import files_of_at_most

CONTENT = {"weights": torch.arange(50_000.0), "step": 3}  # 200 KB


def test_the_hash_is_of_what_lies_on_the_disk(tmp_path):
    told = write_file(tmp_path / "run.pt", CONTENT)
    data = (tmp_path / "run.pt").read_bytes()
    assert told == {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    assert torch.equal(torch.load(tmp_path / "run.pt")["weights"], CONTENT["weights"])


@pytest.mark.parametrize("most", [0, 100, 10_000, 150_000])
def test_a_full_disk_is_told_with_the_file(tmp_path, most):
    with files_of_at_most(most), pytest.raises(OSError, match="File too large: '.*run.pt'") as told:
        write_file(tmp_path / "run.pt", CONTENT)
    assert told.value.errno == errno.EFBIG


def test_what_cannot_be_saved_is_no_matter_of_the_disk(tmp_path):
    with pytest.raises((AttributeError, TypeError), match="lambda|pickle"):
        write_file(tmp_path / "run.pt", {"f": lambda: None})
