"""The text encoder from scratch: any text is read, padding does not matter, and it travels with its vocabulary."""

import pytest
import torch
from torch import nn

from nar_t2i.errors import UserError
from nar_t2i.folders import load_part, save_part
from nar_t2i.prepare.sentencepiece import train_sentencepiece
from nar_t2i.text import NullCaption, ScratchTextEncoder
from nar_t2i.training.init_from import load_weights
from nar_t2i.training.optim import parameter_groups

SHAPES = ("circle", "square", "star")
CAPTIONS = [f"{n} {c} {s}" for n in ("a", "two", "three") for c in ("red", "blue") for s in SHAPES]


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.model"
    train_sentencepiece(CAPTIONS * 5, path, 320)
    return str(path)


@pytest.fixture
def text(vocabulary):
    torch.manual_seed(0)
    return ScratchTextEncoder(vocabulary, width=16, depth=2, heads=2, max_length=24)


def with_random_convolutions(text):
    for block in text.blocks:
        nn.init.normal_(block.local.convolution.weight)
    return text


@pytest.mark.parametrize("reach", [0, 3])
def test_padding_does_not_matter(vocabulary, reach):
    text = ScratchTextEncoder(vocabulary, width=16, depth=2, heads=2, max_length=64, word_reach=reach)
    if reach:
        with_random_convolutions(text)
    together, alone = text(["a red circle", "three blue squares, two red stars and more" * 2]), text(["a red circle"])
    length = alone.masks[0].shape[1]
    assert length < together.masks[0].shape[1]
    torch.testing.assert_close(together.states[0][:1, :length], alone.states[0])
    torch.testing.assert_close(together.pooled[:1], alone.pooled)


def test_word_convolutions_start_as_nothing_and_then_reach_as_far_as_they_say(vocabulary):
    options = {"width": 16, "depth": 1, "heads": 2, "max_length": 24}
    torch.manual_seed(0)
    plain = ScratchTextEncoder(vocabulary, **options)
    text = ScratchTextEncoder(vocabulary, **options, word_reach=2)
    text.load_state_dict(plain.state_dict(), strict=False)
    captions = ["a red circle", "three blue squares"]
    assert torch.equal(text(captions).states[0], plain(captions).states[0])

    local = with_random_convolutions(text).blocks[0].local
    x, mask = torch.randn(1, 9, 16, requires_grad=True), torch.arange(9)[None] < 8
    local(x, mask)[0, 3].sum().backward()
    assert x.grad.abs().sum(-1)[0].gt(0).tolist() == [False, *[True] * 5, *[False] * 3]


def test_order_of_words_matters(text):
    condition = text(["red blue", "blue red"])
    assert not torch.allclose(condition.pooled[0], condition.pooled[1], atol=1e-3)


@pytest.mark.parametrize("caption", ["", " ", "\n\t", "émigré Ærø 東京の猫", "🟥 on 🟦", "a\0b", "\udcff\ud83d", "ﬁ ½"])
def test_any_text_is_read(text, caption):
    condition = text([caption, "a red circle"])
    assert condition.masks[0].any(1).all()
    assert condition.states[0].isfinite().all() and condition.pooled.isfinite().all()


def test_bytes_outside_of_the_vocabulary_are_told_apart(text):
    condition = text(["東", "西"])
    assert not torch.allclose(condition.pooled[0], condition.pooled[1], atol=1e-3)


def test_letter_case_does_not_matter(text):
    assert torch.equal(*text(["A Red CIRCLE", "a red circle"]).pooled)


def test_long_captions_are_cut_and_counted_and_keep_the_end_mark(text):
    codes, mask = text.tokenize(["red " * 10_000, "a red circle"])
    assert codes.shape == (2, 24) and text.truncated == 1
    assert mask.sum(1)[0] == 24 > mask.sum(1)[1]
    end = codes[1, mask[1]][-1]
    assert codes[0, -1] == end and (codes[0, :-1] != end).all()
    text(["red " * 10_000] * 2)
    assert text.truncated == 3


def test_gradient_reaches_all_parameters(text):
    condition = text(["three blue squares, two red stars and more " * 3])
    (condition.states[0].square().mean() + condition.pooled.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in text.parameters())


def test_it_travels_with_its_vocabulary(text, vocabulary, tmp_path):
    save_part(text, tmp_path / "text")
    (tmp_path / "text").rename(tmp_path / "moved")
    loaded = load_part(tmp_path / "moved")
    assert torch.equal(loaded(CAPTIONS).states[0], text.eval()(CAPTIONS).states[0])
    assert loaded._described_args["vocabulary"].startswith(str(tmp_path / "moved"))


def test_a_file_that_is_no_vocabulary(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        ScratchTextEncoder(str(tmp_path / "none.model"))
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(UserError, match="text.model is not a SentencePiece model"):
        ScratchTextEncoder(str(tmp_path / "text.model"))


def test_the_null_caption_replaces_states_mask_and_pooled_together(text):
    condition = text(CAPTIONS[:3])._replace(scalars={"score": torch.arange(3.0)})
    null = NullCaption(text.widths, text.pooled_width)
    with torch.no_grad():
        null.pooled.fill_(2.0)
    dropped = torch.tensor([True, False, True])
    mixed, nothing = null(condition, dropped), null(condition)
    for row, is_dropped in enumerate(dropped):
        source = nothing if is_dropped else condition
        assert torch.equal(mixed.states[0][row], source.states[0][row])
        assert torch.equal(mixed.masks[0][row], source.masks[0][row])
        assert torch.equal(mixed.pooled[row], source.pooled[row])
    assert torch.equal(mixed.scalars["score"], condition.scalars["score"])
    assert nothing.masks[0].sum(1).tolist() == [1, 1, 1]
    assert torch.equal(nothing.states[0][0, 0], null.states[0]) and (nothing.pooled == 2).all()
    assert torch.equal(nothing.states[0][0], nothing.states[0][2]), "the null caption depends on the caption"


def test_frozen_weights_come_from_elsewhere_and_stay(vocabulary, text, tmp_path):
    sizes = {"width": 16, "depth": 2, "heads": 2, "max_length": 24}
    frozen = ScratchTextEncoder(vocabulary, **sizes, trainable="none")
    torch.save({"state_dict": text.state_dict()}, tmp_path / "text.ckpt")
    assert len(load_weights(frozen, tmp_path / "text.ckpt").loaded) == len(text.state_dict())
    states, expected = (encoder(CAPTIONS).states[0] for encoder in (frozen, text))
    assert torch.equal(states, expected)
    assert expected.requires_grad and not states.requires_grad
    assert parameter_groups([frozen], weight_decay=0.1) == []
    save_part(frozen, tmp_path / "text")
    assert torch.equal(load_part(tmp_path / "text")(CAPTIONS).states[0], states)
