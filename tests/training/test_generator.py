"""Generator training: captions are dropped at the stated rate, masks are a sample's own, and runs can be divided."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image

from nar_t2i.data import CaptionedImages
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.data.order import GlobalBatchSampler
from nar_t2i.errors import UserError
from nar_t2i.inference import Confidence
from nar_t2i.learning import Masked, Progressive
from nar_t2i.learning.terms import draw_masks
from nar_t2i.networks import EncoderDecoder
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.pipeline import TextToImage
from nar_t2i.prepare.sentencepiece import train_sentencepiece
from nar_t2i.prepare.tokens import encode_tokens
from nar_t2i.schedules import Guidance
from nar_t2i.text import BertTextEncoder, ScratchTextEncoder
from nar_t2i.training import GeneratorModule, checkpoints
from nar_t2i.training.init_from import check_vocabulary, load_weights
from nar_t2i.training.logged_pictures import log_picture
from nar_t2i.training.optim import OptimizerConfig
from nar_t2i.types import Batch, Encoded, LearningStrategy
from tests.text.tiny_models import tiny_bert
from tests.tiny_pipeline import CAPTIONS, tiny_pipeline
from tests.toys import ToyCodec, ToyText

SIZE = 16


@part
class Watched(LearningStrategy):
    """Masked training that keeps the conditions and the masks it was given."""

    def __init__(self):
        super().__init__()
        self.inner, self.conditions, self.masks = Masked("cosine"), [], []

    def loss(self, network, batch, noise, progress):
        self.conditions.append(batch.condition)
        self.masks.append(draw_masks(noise, "cosine", network.spec.shape))
        return self.inner.loss(network, batch, noise, progress)


class Untrained(GeneratorModule):
    """For steps outside of a trainer."""

    progress = 0.5


def small(spec, widths):
    net = EncoderDecoder(spec, widths, width=16, depth=1, heads=2)
    torch.nn.init.normal_(net.head.logits.weight, std=0.3)
    return net


def made(cls=GeneratorModule, text=None, learning=None, codec=None, **kwargs):
    torch.manual_seed(0)
    # The bias of attention's keys has no gradient but rounding, which AdamW would take for one: hence the large eps.
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, eps=1e-3)
    return cls(
        codec or ToyCodec(), text or ToyText(), small, learning or Watched(), Confidence(2), Guidance(2.0), config,
        **{"ema_decay": 0.5, **kwargs},
    )  # fmt: skip


def batch(ids):
    torch.manual_seed(3)
    ids = torch.as_tensor(ids)
    captions = [f"caption {i} of {i * i}" for i in ids.tolist()]
    tokens = torch.randint(4, (1000, 4))[ids % 1000]
    return Batch(ids, [str(i) for i in ids.tolist()], captions, None, tokens, {})


def step(module, ids, dropout=True):
    """The loss of one micro-batch of training."""
    total, weight = module._terms(batch(ids), module.seed, dropout, progress=0.0)["loss"]
    return total / weight


class Planned(GeneratorModule):
    """Whose optimizer is made without a trainer."""

    def total_steps(self):
        return 10


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(("rate", "decay"), [(None, None), (1e-4, 0.2)])
def test_the_text_encoder_has_a_rate_and_a_decay_of_its_own(tmp_path, kind, rate, decay):
    config = OptimizerConfig(kind=kind, learning_rate=1e-2, muon_learning_rate=5e-2, weight_decay=0.1)
    text = BertTextEncoder(tiny_bert(tmp_path), trainable="all", max_length=16)
    module = Planned(ToyCodec(), text, small, Masked(), optimizer=config, text_learning_rate=rate, text_weight_decay=decay)
    own, told = {id(p) for p in module.text.parameters()}, []
    for group in module.configure_optimizers()["optimizer"].param_groups:
        (is_text,) = {id(p) in own for p in group["params"]}
        peak = (5e-2 if group.get("muon") else 1e-2) * (rate / 1e-2 if is_text and rate else 1)
        assert group["initial_lr"] == pytest.approx(peak)
        assert group["weight_decay"] in (0.0, decay if is_text and decay else 0.1)
        assert not (is_text and rate and group.get("muon"))  # pretrained by AdamW, trained on by AdamW
        told.append((is_text, group["weight_decay"] > 0))
    assert set(told) == {(True, True), (True, False), (False, True), (False, False)}


def test_code_vectors_of_a_tokenizer_that_has_none_are_named():
    def network(spec, widths):
        return EncoderDecoder(spec, widths, width=16, depth=1, heads=2, code_width=4)

    with pytest.raises(UserError, match="^code_width: a ToyCodec has no vectors of its codes; set it to 0$"):
        GeneratorModule(ToyCodec(), ToyText(), network, Masked())


def test_what_a_batch_holds_is_rounded_in_no_precision(tmp_path, cached):
    """As Lightning does for bf16-true, and under ZeRO in all precisions but fp32."""
    trainer = fit(made(), tmp_path, cached, steps=1, precision="bf16-true")
    given = batch([0, 1])._replace(scalars={"original_width": torch.tensor([1333.0, 70000.0])}, errors=torch.full((2, 4), 1.001))
    taken = trainer.precision_plugin.convert_input(given)
    assert torch.equal(taken.scalars["original_width"], given.scalars["original_width"])
    assert torch.equal(taken.errors, given.errors) and taken.errors.dtype == torch.float32


def test_a_picture_that_cannot_be_written_is_told_and_training_goes_on(tmp_path, capsys):
    (tmp_path / "pictures").write_text("a file where a folder should be")
    trainer = SimpleNamespace(is_global_zero=True, sanity_checking=False, default_root_dir=tmp_path)
    log_picture(SimpleNamespace(trainer=trainer, global_step=3, loggers=[]), "samples", Image.new("RGB", (2, 2)))
    assert f"nar-t2i: {tmp_path}/pictures: File exists; the picture of step 3 is missing" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_at_the_stated_rate(rate):
    dropped = made(caption_dropout=rate).dropped(Noise(0, torch.arange(40_000)))
    spread = (rate * (1 - rate) / 40_000) ** 0.5
    assert abs(float(dropped.float().mean()) - rate) <= 4 * spread
    # Control: 10% kept, the fault of several peers, is far away.
    assert rate == 0.5 or abs(float((~dropped).float().mean()) - rate) > 0.7


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_dropped_captions_are_the_null_caption_and_the_others_are_the_text(rate):
    module = made(Untrained, caption_dropout=rate)
    ids = torch.arange(200)
    loss = step(module, ids)
    seen, dropped = module.learning.conditions[0], module.dropped(Noise(module.seed, ids))
    text = module.text(batch(ids).captions)
    null = module.null(text)
    for row in range(200):
        expected = null if dropped[row] else text
        assert torch.equal(seen.states[0][row], expected.states[0][row])
        assert torch.equal(seen.masks[0][row], expected.masks[0][row])
        assert torch.equal(seen.pooled[row], expected.pooled[row])
    assert dropped.any() == (rate > 0) and dropped.all() == (rate == 1)
    # And it reaches the network's weights: what is always dropped cannot be learned from, what never is leaves no null.
    loss.backward()
    assert (module.text.embedding.weight.grad.abs().sum() > 0) == (rate < 1)
    null_gradient = module.null.states[0].grad
    assert (null_gradient is not None and null_gradient.abs().sum() > 0) == (rate > 0)


def test_validation_drops_nothing():
    module = made(Untrained, caption_dropout=1.0)
    step(module, range(20), dropout=False)
    text = module.text(batch(range(20)).captions)
    assert torch.equal(module.learning.conditions[0].states[0], text.states[0])


def test_dropping_and_masking_are_independent():
    noise = Noise(0, torch.arange(20_000))
    dropped = made(caption_dropout=0.5).dropped(noise)
    ratio = draw_masks(noise, "cosine", (64,)).double().mean(1)
    difference = float(ratio[dropped].mean() - ratio[~dropped].mean())
    assert abs(difference) < 4 * float(ratio.std()) / 5_000**0.5


def masks_of(ids, seed=0):
    module = made(Untrained, seed=seed)
    step(module, ids)
    return module.learning.masks[0]


def test_ranks_draw_different_masks_which_one_rank_draws_too():
    ranks = [next(iter(GlobalBatchSampler(64, 32, rank, 2))) for rank in range(2)]
    first, second = (masks_of(ids) for ids in ranks)
    assert not torch.equal(first, second)
    # Of the 15 masks of four tokens both draw many, each in its own places.
    assert (first != second).any(1).float().mean() > 0.5
    whole = masks_of(next(iter(GlobalBatchSampler(64, 64))))
    assert torch.equal(whole, torch.cat([first, second]))


def test_seeds_matter():
    assert torch.equal(masks_of(range(64)), masks_of(range(64)))
    assert (masks_of(range(64)) != masks_of(range(64), seed=1)).any(1).float().mean() > 0.5
    dropped = [made(caption_dropout=0.5).dropped(Noise(seed, torch.arange(64))) for seed in (0, 1)]
    assert not torch.equal(*dropped)


def gradients(parts):
    module = made(Untrained, caption_dropout=0.3).double()
    for ids in np.split(np.arange(16), parts):
        (step(module, ids) / parts).backward()
    return {name: p.grad for name, p in module.named_parameters()}


def test_micro_batches_do_not_change_the_gradient():
    whole = gradients(1)
    assert [name for name, g in whole.items() if g is None] == [], "a parameter without a gradient stops DDP"
    assert [name for name, g in whole.items() if not g.abs().sum() > 0] == ["null.pooled"]  # this network reads none
    for parts in (2, 4, 16):
        for name, gradient in gradients(parts).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-12)


# In a trainer


class Record(Callback):
    def __init__(self, stop_at=None):
        self.losses, self.stop_at = [], stop_at

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step == self.stop_at:
            trainer.should_stop = True


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Scenes and a cache of their tokens."""
    folder = tmp_path_factory.mktemp("cache")
    source = RenderedScenes("train", 64, SIZE)
    encode_tokens(ToyCodec(), source, folder, batch_size=32)
    return source, str(folder)


def fit(module, folder, cached, steps=6, resume=None, callbacks=(), micro=8, data=None, **kwargs):
    source, cache = cached
    data = data or CaptionedImages(source, SIZE, global_batch_size=16, micro_batch_size=micro, cache=cache)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, use_distributed_sampler=False, callbacks=list(callbacks),
        **kwargs,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("kind", ["scratch", "frozen", "trained"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, cached, kind):
    bert = None if kind == "scratch" else tiny_bert(tmp_path / "bert")

    def module():
        return made(text=bert and BertTextEncoder(bert, trainable="all" if kind == "trained" else "none", max_length=16))

    whole, first, second = Record(), Record(stop_at=3), Record()
    uninterrupted, resumed = module(), module()
    fit(uninterrupted, tmp_path / "whole", cached, callbacks=[whole])
    fit(module(), tmp_path / "half", cached, callbacks=[first]).save_checkpoint(tmp_path / "half.ckpt")
    assert fit(resumed, tmp_path / "half", cached, 6, tmp_path / "half.ckpt", [second]).global_step == 6
    assert first.losses + second.losses == whole.losses and len(whole.losses) == 12
    assert equal(resumed, uninterrupted)
    assert all(torch.equal(resumed.ema.average[k], v) for k, v in uninterrupted.ema.average.items())
    names = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in names} == {"null", "network"} | ({"text"} if kind != "frozen" else set())

    t2i = TextToImage.from_pretrained(tmp_path / "half/model", trusted=("tests",))
    with resumed.ema.applied(resumed):
        expected = resumed.pipeline().sample(["a red circle", "two blue squares"])
    assert torch.equal(t2i.sample(["a red circle", "two blue squares"]).tokens, expected.tokens)
    assert torch.equal(t2i.text(["a red"]).states[0], _averaged_states(resumed))


def _averaged_states(module):
    with module.ema.applied(module), torch.no_grad():
        return module.text.eval()(["a red"]).states[0]


def test_the_exported_weights_are_the_average(tmp_path, cached):
    module = made()
    fit(module, tmp_path, cached)
    exported = TextToImage.from_pretrained(tmp_path / "model", trusted=("tests",))
    for name in ("text", "null", "network"):
        for key, value in getattr(exported, name).state_dict().items():
            assert torch.equal(value, module.ema.average[f"{name}.{key}"])
    assert not equal(exported.network, module.network)


def test_without_an_average_the_weights_themselves_are_exported(tmp_path, cached):
    module = made(ema_decay=0.0)
    fit(module, tmp_path, cached, 2)
    assert equal(TextToImage.from_pretrained(tmp_path / "model", trusted=("tests",)).network, module.network)


def test_the_codec_is_frozen_and_in_no_checkpoint(tmp_path, cached):
    codec = ToyCodec()
    codec.layer = torch.nn.Linear(2, 2)
    module = made(codec=codec)
    assert not any(p is q for p in module.parameters() for q in codec.parameters())
    assert not any(p.requires_grad for p in codec.parameters()) and not codec.training
    assert not [name for name in module.state_dict() if "codec" in name or "layer" in name.split(".")]


def test_cached_tokens_of_another_codec_are_refused(tmp_path, cached):
    codec = ToyCodec()
    codec.gain += 1
    with pytest.raises(UserError, match="codec"):
        fit(made(codec=codec), tmp_path, cached, 1)
    with pytest.raises(UserError):
        fit(made(codec=ToyCodec("binary")), tmp_path, cached, 1)


@part
class ErringCodec(ToyCodec):
    """With an error for each token."""

    def encode(self, images):
        tokens = super().encode(images).tokens
        return Encoded(tokens, tokens / 7 + torch.tensor([0.03, 0.0, 0.02, 0.01]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])  # the errors stay fp32 in both
def test_stages_by_error_train_from_a_cache_that_holds_errors(tmp_path, cached, precision):
    source, _ = cached
    encode_tokens(ErringCodec(), source, tmp_path / "cache", errors=True)
    module = made(codec=ErringCodec(), learning=Progressive(2))
    fit(module, tmp_path, (source, str(tmp_path / "cache")), 2, precision=precision)
    from_images = made(codec=ErringCodec(), learning=Progressive(2))
    data = CaptionedImages(source, SIZE, global_batch_size=16, micro_batch_size=8)
    fit(from_images, tmp_path / "images", cached, 2, data=data, precision=precision)
    assert equal(module, from_images)


@pytest.mark.parametrize("split", ["train", "validation", "mixture"])
def test_a_cache_without_errors_is_refused_before_anything_is_trained(tmp_path, cached, split):
    source, cache = cached
    encode_tokens(ErringCodec(), source, tmp_path / "cache", errors=True)
    caches = {"cache": str(tmp_path / "cache"), "validation": source, "validation_cache": cache}
    if split == "mixture":
        parts = [{"source": source, "cache": part} for part in (caches["cache"], cache)]
        data = CaptionedImages(parts, SIZE, global_batch_size=16)
    else:
        data = CaptionedImages(source, SIZE, global_batch_size=16, **({"cache": cache} if split == "train" else caches))
    module, losses = made(codec=ErringCodec(), learning=Progressive(2)), Record()
    with pytest.raises(UserError, match=f"the cache {cache} holds no quantisation errors; .* --errors"):
        fit(module, tmp_path, cached, 1, callbacks=[losses], data=data, num_sanity_val_steps=0)
    assert not losses.losses
    fit(made(codec=ErringCodec()), tmp_path, cached, 1, data=data, num_sanity_val_steps=0)  # which needs none


def test_two_micro_batches_and_two_ranks_train_what_one_does(tmp_path, cached):
    """16 images a step: 1 × 16, 2 × 8 accumulated, and 8 on each of two ranks under plain DDP."""
    whole, divided, ranks = made(), made(), made(learning=Masked("cosine"))
    assert fit(whole, tmp_path, cached, 3, micro=16).accumulate_grad_batches == 1
    assert fit(divided, tmp_path, cached, 3).accumulate_grad_batches == 2
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    trainer = fit(ranks, tmp_path, cached, 3, strategy=strategy, devices=2)
    assert trainer.world_size == 2
    for other in (divided, ranks):
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def reading(place, seed=0, captions=CAPTIONS):
    """A generator that reads a tokenizer's codes and a vocabulary's words."""
    place.mkdir(exist_ok=True)
    t2i = tiny_pipeline(place, seed=seed)
    train_sentencepiece(captions, place / "vocabulary.model", 300)
    text = ScratchTextEncoder(str(place / "vocabulary.model"), width=16, depth=1, heads=2, max_length=24)
    return made(Untrained, text=text, codec=t2i.tokenizer)


def test_a_checkpoint_of_another_tokenizer_or_vocabulary_is_refused(tmp_path):
    """Of the same shapes, which nothing else would tell."""
    module, others = reading(tmp_path / "a"), ["a big dog beside a tiny cat"] * 12
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    reading(tmp_path / "b").on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="model.init_args.tokenizer: the checkpoint is of another tokenizer"):
        reading(tmp_path / "c", seed=1).on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="model.init_args.text: the checkpoint is of another vocabulary"):
        reading(tmp_path / "d", captions=others).on_load_checkpoint(checkpoint)
    del checkpoint[checkpoints.READS]  # from before they were told
    reading(tmp_path / "e", seed=1).on_load_checkpoint(checkpoint)


def test_words_are_not_taken_over_from_another_vocabulary(tmp_path):
    module, others = reading(tmp_path / "a"), ["a big dog beside a tiny cat"] * 12
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "run.ckpt")
    for text, refused in (
        (reading(tmp_path / "b").text, False),
        (reading(tmp_path / "c", captions=others).text, True),
        (ToyText(), False),
        (BertTextEncoder(tiny_bert(tmp_path / "bert"), max_length=16), False),
    ):
        start = made(Untrained, text=text, codec=module.codec)
        report = load_weights(start, tmp_path / "run.ckpt")
        assert report.loaded
        if refused:
            with pytest.raises(UserError, match="run.ckpt was trained with another vocabulary"):
                check_vocabulary(start, report)
        else:  # the same words, none, or such that nothing was taken over for
            check_vocabulary(start, report)


@pytest.mark.parametrize("cache", [True, False])
def test_images_of_another_size_than_the_tokenizers_are_refused(tmp_path, cached, cache):
    data = CaptionedImages(cached[0], 2 * SIZE, 16, cache=cached[1] if cache else None)
    with pytest.raises(UserError, match=rf"data.init_args.image_size {2 * SIZE}: the tokenizer is one of {SIZE} px"):
        fit(made(), tmp_path, cached, data=data)


@pytest.mark.parametrize(("key", "value"), [("caption_dropout", 10.0), ("caption_dropout", -0.1), ("scene_prompts", -1)])
def test_shares_and_counts_out_of_range_are_named(key, value):
    with pytest.raises(UserError, match=f"{key} must be"):
        made(**{key: value})
