"""SentencePiece models: deterministic, any text survives, scarce text gives a smaller vocabulary."""

import pytest
import sentencepiece

from nar_t2i.data.shards import ShardSource
from nar_t2i.errors import UserError
from nar_t2i.prepare.sentencepiece import captions_of, main, train_sentencepiece
from nar_t2i.text import ScratchTextEncoder
from tests.data.making_shards import write_shards

CAPTIONS = [f"a {c} {s} {p}" for c in ("red", "green") for s in ("circle", "star") for p in ("on grey", "above it")] * 5


def test_any_text_survives(tmp_path):
    size = train_sentencepiece(CAPTIONS, tmp_path / "m" / "a.model", 8000)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m" / "a.model"))
    assert size == model.vocab_size() < 8000
    for text in ("a red star", "日本 😀 žluťoučký", "ALL CAPS"):
        assert model.decode(model.encode(text)) == text
        assert model.unk_id() not in model.encode(text)
    assert (model.pad_id(), model.unk_id(), model.bos_id(), model.eos_id()) == (0, 1, 2, 3)
    assert len(model.encode("a red star")) < len(model.encode("b ыed ştaя"))


def test_deterministic(tmp_path):
    for name in "ab":
        train_sentencepiece(CAPTIONS, tmp_path / name, 279)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_size_is_a_limit(tmp_path):
    assert train_sentencepiece(CAPTIONS, tmp_path / "a", 278) == 278


@pytest.mark.parametrize("captions,size", [([], 300), (CAPTIONS, 100)])
def test_what_cannot_be_trained_leaves_nothing(tmp_path, captions, size):
    with pytest.raises(UserError, match="no SentencePiece model"):
        train_sentencepiece(captions, tmp_path / "a", size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), UserError("the tar was replaced")])
def test_what_happens_to_the_captions_is_told_as_it_is(tmp_path, problem):
    def captions():
        yield "a caption"
        raise problem

    with pytest.raises(type(problem)) as raised:
        train_sentencepiece(captions(), tmp_path / "model", 300)
    assert raised.value is problem and not (tmp_path / "model").exists()


def test_all_captions_of_a_source_are_used_up_to_the_limit(tmp_path):
    source = ShardSource(str(write_shards(tmp_path, [6, 4], captions=2)))
    assert list(captions_of(source)) == [f"caption {n}.{c}" for n in range(10) for c in range(2)]
    assert list(captions_of(source, 4)) == [f"caption {n}.{c}" for n in (0, 3, 6, 9) for c in range(2)]


def test_the_command(tmp_path, capsys):
    folder = write_shards(tmp_path / "s", [6])
    assert main([str(folder), str(tmp_path / "out.model"), "--vocab-size", "280"]) == 0
    assert "pieces" in capsys.readouterr().out and (tmp_path / "out.model").exists()
    assert main([str(tmp_path / "none"), str(tmp_path / "out.model")]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_vocabulary_is_of_what_the_encoder_reads(tmp_path):
    captions = [
        f"{a} {b} over the {c}" for a in ("Red", "Green", "Blue") for b in ("Tower", "Bridge", "Castle") for c in ("River", "Ocean")
    ] * 20
    train_sentencepiece([caption.title() for caption in captions], tmp_path / "title.model", 400)
    train_sentencepiece([caption.lower() for caption in captions], tmp_path / "lower.model", 400)
    assert (tmp_path / "title.model").read_bytes() == (tmp_path / "lower.model").read_bytes()
    encoder = ScratchTextEncoder(str(tmp_path / "title.model"), width=8, depth=1, heads=1, max_length=32)
    assert int(encoder.tokenize(["Red Tower Over The River"])[1].sum()) == 6  # five words, and the end
