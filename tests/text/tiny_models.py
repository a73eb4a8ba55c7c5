"""A BERT, a T5 and a CLIP of a few layers with vocabularies of their own, as transformers saves them."""

import io
import json
from pathlib import Path

import sentencepiece
import torch
import transformers

from nar_t2i.data.captions import RenderedScenes

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue circle square two ##s on the".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_bert(folder: Path, positions: int = 32) -> str:
    """WordPiece of 14 tokens; 2 layers."""
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=positions,
    )  # fmt: skip
    _save(transformers.BertModel, config, folder)
    transformers.BertTokenizer(vocab={word: code for code, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)


def tiny_t5(folder: Path) -> str:
    """A SentencePiece model of 100 pieces, trained on captions of scenes, as T5's own folders hold it; 3 layers."""
    scenes, model = RenderedScenes("train", 200), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([caption for index in range(200) for caption in scenes.read_text(index).captions]),
        model_writer=model, vocab_size=100, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    config = transformers.T5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    _save(transformers.T5EncoderModel, config, folder)
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    return str(folder)


def tiny_clip(folder: Path, positions: int = 32) -> str:
    """Byte pairs of letters; 3 layers, and a projection from 16 to 12."""
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: code for code, piece in enumerate(pieces)}
    start, end = len(pieces) - 2, len(pieces) - 1
    config = transformers.CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=positions, projection_dim=12, bos_token_id=start, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    _save(transformers.CLIPTextModelWithProjection, config, folder)
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[("r", "e"), ("re", "d</w>")]).save_pretrained(folder)
    return str(folder)


def _save(model_class: type, config: transformers.PretrainedConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model_class(config).save_pretrained(folder)


def make_named(text: dict) -> None:
    """Write a tiny model wherever the text encoder of a recipe, or one within it, looks for its folder."""
    makers = {"BertTextEncoder": tiny_bert, "T5TextEncoder": tiny_t5, "ClipTextEncoder": tiny_clip}
    arguments = text.get("init_args", {})
    for inner in arguments.get("encoders", ()):
        make_named(inner)
    kind = text["class_path"].rpartition(".")[2]
    if kind in makers and not Path(arguments["folder"]).exists():
        positions = {} if kind == "T5TextEncoder" else {"positions": arguments.get("max_length", 77)}
        makers[kind](Path(arguments["folder"]), **positions)
