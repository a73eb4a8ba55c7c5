"""A BERT of two layers and a WordPiece vocabulary of 14, as transformers saves them."""

from pathlib import Path

import torch
import transformers

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue circle square two ##s on the".split()


def tiny_bert(folder: Path) -> str:
    """Write it into `folder`, which is returned."""
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(vocab={word: code for code, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)
