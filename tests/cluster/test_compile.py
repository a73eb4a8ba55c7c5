"""torch.compile on the network: the same tokens, and no compilation for each step. A minute of compiling, so it stands here."""

import torch
from torch._dynamo.utils import counters

from nar_t2i.inference import Confidence
from nar_t2i.pipeline import TextToImage
from tests.tiny_pipeline import CAPTIONS, tiny_pipeline


def test_a_compiled_network_draws_the_same_and_compiles_once_for_all_steps(tmp_path):
    tiny_pipeline(tmp_path).save_pretrained(tmp_path / "model")
    t2i = TextToImage.from_pretrained(tmp_path / "model").to(dtype=torch.float64)
    t2i.inference = Confidence(8)
    plain = t2i.sample(CAPTIONS).tokens
    torch._dynamo.reset()
    counters.clear()
    assert torch.equal(t2i.compile().sample(CAPTIONS).tokens, plain)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # for one number of slots, and for any
