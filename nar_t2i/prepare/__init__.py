"""Writing what training reads: shards, token caches, SentencePiece models."""
