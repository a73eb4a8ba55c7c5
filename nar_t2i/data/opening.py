"""What a recipe says about its data → a source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nar_t2i.data.mixture import Mixture
from nar_t2i.data.shards import ShardSource
from nar_t2i.data.source import Source
from nar_t2i.data.text_cache import TextCache, TextCachedSource
from nar_t2i.data.token_cache import CachedSource, TokenCache
from nar_t2i.errors import UserError


@dataclass
class Weighted:
    """One part of a mixture.

    Args:
        source: a folder or pattern of shards, or a source.
        weight: how often it is drawn, relative to the others.
        cache: folder of the tokens of this part, or none.
        text_cache: folder of the text states of this part, or none.
    """

    source: str | Source
    weight: float = 1.0
    cache: str | None = None
    text_cache: str | None = None


def is_remote(path: str) -> bool:
    """Whether a recipe's source is a URL or a command rather than a path."""
    return path.startswith("pipe:") or "://" in path


def open_source(
    given: str | list[Weighted] | Source, cache: str | None = None, text_cache: str | None = None, index_folder: str | None = None
) -> Source:
    """A source from what a recipe says; with `cache`, its images come as tokens, with `text_cache` its captions with
    their states. index_folder: of shards' indices, where they do not stand beside them. Raises UserError for bad data."""
    if isinstance(given, list):
        if cache is not None or text_cache is not None:
            raise UserError("a mixture has one cache a part: name it beside each source, not for the whole")
        parts = [Weighted(**part) if isinstance(part, Mapping) else part for part in given]
        return Mixture([open_source(p.source, p.cache, p.text_cache, index_folder) for p in parts], [p.weight for p in parts])
    if isinstance(given, str):
        if is_remote(given):
            raise UserError(f"{given} can only be streamed as the one training source, not mixed, cached or validated")
        given = ShardSource(given, index_folder=index_folder)
    if text_cache is not None:
        given = TextCachedSource(given, TextCache(text_cache))
    return given if cache is None else CachedSource(given, TokenCache(cache))
