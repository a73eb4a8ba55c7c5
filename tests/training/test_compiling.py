"""What recorded shapes need: captions of one length. What cannot be compiled."""

from types import SimpleNamespace

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.text import BertTextEncoder, JointTextEncoder
from nar_t2i.training.compiling import can_compile, longest, of_one_length
from nar_t2i.types import Condition
from tests.text.tiny_models import tiny_bert


def test_padding_is_not_seen():
    text = Condition((torch.ones(2, 3, 4),), (torch.tensor([[True, True, True], [True, False, False]]),))
    padded = of_one_length(text, [5])
    assert padded.states[0].shape == (2, 5, 4) and torch.equal(padded.masks[0][:, :3], text.masks[0])
    assert not padded.masks[0][:, 3:].any() and torch.equal(padded.states[0][:, :3], text.states[0])
    assert torch.equal(of_one_length(text, [3]).states[0], text.states[0])


def test_the_longest_captions_of_an_encoder(tmp_path):
    bert = BertTextEncoder(tiny_bert(tmp_path), max_length=24)
    assert longest(bert) == [24]
    assert longest(JointTextEncoder([bert], pooled_token=False)) == [24]
    assert longest(JointTextEncoder([bert])) is None  # and one word more


def test_what_cannot_be_compiled_is_told():
    def on(device, accumulated=1, **strategy):
        return SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device(device), **strategy), accumulate_grad_batches=accumulated
        )

    assert (
        can_compile("kernels", on("cuda", 4))
        and can_compile("kernels and graphs", on("cuda"))
        and can_compile("kernels and graphs", on("cpu", 4))
    )
    assert can_compile("kernels", on("cuda", stage=2))
    with pytest.raises(UserError, match="model.init_args.compile: .*accumulate"):
        can_compile("kernels and graphs", on("cuda", 4))
    with pytest.warns(UserWarning, match="left out under ZeRO-3"):
        assert not can_compile("kernels", on("cuda", stage=3))
