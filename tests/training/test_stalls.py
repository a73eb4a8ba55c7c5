"""A training step leaves a GPU's host free to run ahead: it reads next to nothing from the device, and copies nothing to it that is
waited for. On a CPU the same operations are made, and can be counted."""

import traceback
from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nar_t2i.data import CaptionedImages
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.learning import Masked, SelfConditioned, Unrolled
from nar_t2i.networks import EncoderDecoder
from nar_t2i.prepare.tokens import encode_tokens
from nar_t2i.text import BertTextEncoder
from nar_t2i.training.guard import Guard, GuardConfig
from nar_t2i.training.monitor import Monitor
from tests.cluster import tiny
from tests.text.tiny_models import tiny_bert
from tests.tiny_pipeline import tiny_pipeline
from tests.toys import ToyCodec

READ, COPIED, COUNTED = "a number is read", "something is copied", "slots are counted"


# Lightning does not wait for a batch's copy to a GPU; what torch's clipping moves is on the device already; data are read, and
# captions made into tokens, on the host; and what the guard reads has reached it (see below).
ASIDE = {
    "move_data_to_device",
    "_get_total_norm",
    "_clip_grads_with_norm_",
    "__getitem__",
    "__getitems__",
    "tokenize",
    "_ask",
    "_read",
}
BY_METHOD = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.item, torch.Tensor.__array__}


class Copies(TorchFunctionMode):
    """Counts what is made on the host and copied to a device, and waited for, and what is read by methods that a CPU has no
    operation for.
    """

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        moved = func is torch.Tensor.to and any(isinstance(x, (torch.device, str)) for x in (*args, *kwargs.values()))
        if made or (moved and not kwargs.get("non_blocking")) or func in BY_METHOD:
            self.found[READ if func in BY_METHOD else COPIED] += not ASIDE & {frame.name for frame in traceback.extract_stack()}
        return func(*args, **kwargs)


class Reads(TorchDispatchMode):
    """Counts what is read from a device."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "equal"):
            self.found[READ] += 1
        indices = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else []
        by_mask = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)
        if by_mask or name in ("nonzero", "masked_select", "_unique2", "unique_dim", "bincount"):
            self.found[COUNTED] += 1
        return func(*args, **(kwargs or {}))


class Watched(Callback):
    """Counts in the steps from the third on, the gaps between them included."""

    def __init__(self, steps):
        self.modes, self.steps = (Copies(), Reads()), steps

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 2:
            for mode in self.modes:
                mode.__enter__()
        if index == 2 + self.steps:
            for mode in reversed(self.modes):
                mode.__exit__(None, None, None)


def stalls(folder, steps=4, **settings):
    """What is waited for in some steps of a run, as often as it is."""
    scenes = RenderedScenes(count=64, image_size=tiny.SIZE)
    encode_tokens(ToyCodec(), scenes, folder / "tokens", 16)
    data = CaptionedImages(scenes, tiny.SIZE, tiny.GLOBAL_BATCH, cache=str(folder / "tokens"))
    watched = Watched(steps)
    trainer = tiny.trainer(
        "auto",
        1,
        steps + 3,
        default_root_dir=folder,
        callbacks=[Guard(GuardConfig()), Monitor(folder), watched],
        log_every_n_steps=100,
    )
    trainer.fit(tiny.Generator(**settings), datamodule=data)
    found = sum((mode.found for mode in watched.modes), Counter())
    return {what: count / steps for what, count in found.items()}


def bert(folder):
    return BertTextEncoder(tiny_bert(folder), trainable="all", max_length=16)


def scratch(folder):
    return tiny_pipeline(folder).text


@pytest.mark.parametrize(("text", "of_captions"), [(bert, 0), (scratch, 1)])  # whose words are counted on the host
@pytest.mark.parametrize(("learning", "passes"), [(Masked(regions=0.5), 1), (Unrolled(2), 2), (SelfConditioned(), 2)])
def test_a_step_waits_only_to_count_the_slots_that_are_read(tmp_path, text, of_captions, learning, passes):
    def network(spec, widths):
        return tiny.with_head(
            EncoderDecoder(spec, widths, width=16, depth=1, heads=2, self_conditioning=isinstance(learning, SelfConditioned))
        )

    found = stalls(tmp_path, text=text(tmp_path), learning=learning, network=network)
    counted = 1 if isinstance(learning, SelfConditioned) else passes  # by the noise, before each pass that reads other slots
    assert found == {COUNTED: counted + of_captions}


def test_next_tokens_wait_for_nothing(tmp_path):
    from nar_t2i.learning import Causal, Prefixes
    from nar_t2i.networks import CausalDecoder, PrefixDecoder

    for learning, network in ((Causal(), CausalDecoder), (Prefixes(), PrefixDecoder)):
        made = lambda spec, widths, network=network: tiny.with_head(network(spec, widths, width=16, depth=1, heads=2))  # noqa: E731
        found = stalls(tmp_path / network.__name__, learning=learning, network=made)
        assert found.pop(COUNTED, 0) <= 1 and not found  # on a CPU, a sequence's tokens are found


class Looks(Masked):
    def loss(self, network, batch, noise, progress):
        terms = super().loss(network, batch, noise, progress)
        assert float(terms["loss"].total) > 0
        terms["loss"].total.detach().tolist(), terms["loss"].total.detach().cpu()
        torch.tensor(0.5, device=batch.tokens.device)
        return terms


def test_what_reads_a_loss_or_copies_a_number_is_seen(tmp_path):
    assert stalls(tmp_path, learning=Looks()) == {READ: 3, COPIED: 1, COUNTED: 1}


def test_the_guard_reads_a_step_when_the_next_has_been_computed(tmp_path, monkeypatch):
    asked, read = Guard._ask, Guard._read
    order = []
    monkeypatch.setattr(
        Guard,
        "_ask",
        lambda self, trainer, optimizer: (order.append(("ask", trainer.global_step)), asked(self, trainer, optimizer))[1],
    )
    monkeypatch.setattr(
        Guard,
        "_read",
        lambda self: (self._asked and order.append(("read", self._asked.step, self._asked.trainer.global_step)), read(self))[1],
    )
    trainer = tiny.trainer("auto", 1, 4, default_root_dir=tmp_path, callbacks=[Guard(GuardConfig())])
    trainer.fit(tiny.Generator(), datamodule=tiny.data())
    assert order == [("ask", 0), ("read", 0, 1), ("ask", 1), ("read", 1, 2), ("ask", 2), ("read", 2, 3), ("ask", 3), ("read", 3, 4)]
