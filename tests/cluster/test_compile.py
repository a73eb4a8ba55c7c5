"""torch.compile on the network: the same tokens and losses, and no compilation for each step. It takes a minute, so it stands
here.
"""

import csv

import torch
from lightning.pytorch import Trainer
from torch._dynamo.utils import counters

from nar_t2i.data import CaptionedImages
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.inference import Confidence
from nar_t2i.learning import Unrolled
from nar_t2i.networks import EncoderDecoder
from nar_t2i.pipeline import TextToImage
from nar_t2i.text import BertTextEncoder
from nar_t2i.training.monitor import Monitor
from tests.cluster.test_resume import fit, went_well
from tests.cluster.tiny import Generator, with_head
from tests.text.tiny_models import tiny_bert
from tests.tiny_pipeline import CAPTIONS, tiny_pipeline


def test_a_compiled_network_draws_the_same_and_compiles_once_for_all_steps(tmp_path):
    tiny_pipeline(tmp_path).save_pretrained(tmp_path / "model")
    t2i = TextToImage.from_pretrained(tmp_path / "model").to(dtype=torch.float64)
    t2i.inference = Confidence(8)
    plain = t2i.sample(CAPTIONS).tokens
    torch._dynamo.reset()
    counters.clear()
    assert torch.equal(t2i.compile().sample(CAPTIONS).tokens, plain)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]  # one block for all


class Kept(Generator):
    """Keeps its losses: of four steps, and of the validation that follows."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.losses = []

    def training_step(self, batch, batch_index):
        loss = super().training_step(batch, batch_index)
        self.losses.append(loss.detach())
        return loss

    def on_validation_epoch_end(self):
        self.losses.append(self.trainer.callback_metrics["validation_loss"])


def trained(folder, compile, **more):
    torch._dynamo.reset()
    counters.clear()
    text = BertTextEncoder(tiny_bert(folder), trainable="all", max_length=24)
    module = Kept(**{"text": text, "learning": Unrolled(2), "compile": compile, **more})
    data = CaptionedImages(
        RenderedScenes(count=64, image_size=16), 16, 8, validation=RenderedScenes("validation", 8, image_size=16)
    )
    Trainer(
        accelerator="cpu",
        max_steps=4,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Monitor(folder)],
        default_root_dir=folder,
    ).fit(module, datamodule=data)
    return torch.stack(module.losses), module.state_dict()


def test_compiled_training_takes_the_losses_of_the_plain_one(tmp_path):
    plain, state = trained(tmp_path, None)
    assert not counters["stats"]["unique_graphs"]
    found, found_state = trained(tmp_path, "kernels and graphs")
    # The monitor counts the first step, uncompiled; of the six passes that follow one block is compiled, and the cross-entropy,
    # once for any number of slots. Validation is not.
    assert counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert found_state.keys() == state.keys()
    assert plain[3] < plain[0] - 1e-3  # it has learned, so that equal losses mean equal updates


def test_compiled_layers_that_are_computed_once_more(tmp_path):
    text = BertTextEncoder(tiny_bert(tmp_path), max_length=24)

    def network(spec, widths):
        return with_head(EncoderDecoder(spec, widths, width=16, depth=2, heads=2, activation_checkpointing=True))

    plain, _ = trained(tmp_path, None, text=text, network=network)
    found, _ = trained(tmp_path, "kernels", text=text, network=network)
    assert 1 <= counters["stats"]["unique_graphs"] <= 5  # the network once, and not once more for another number of slots
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert abs(plain[3] - plain[0]) > 1e-2


def test_compiled_training_under_zero(tmp_path):
    losses = []
    for kind in ("null", "kernels"):
        folder = tmp_path / kind
        folder.mkdir()
        went_well(fit(folder, 2, "deepspeed_stage_2", f"--model.init_args.compile={kind}", "--trainer.max_steps=4"))
        with open(folder / "run/metrics.csv", newline="") as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file) if row["loss"]])
    assert len(losses[0]) == 4 and losses[0][0] != losses[0][3]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-5)
