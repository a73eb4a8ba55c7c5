"""Captioned images → batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nar_t2i.data.captioned import CaptionedImages as CaptionedImages

__all__ = ["CaptionedImages"]


def __getattr__(name: str) -> Any:
    """The data module on demand: it needs lightning, whose import takes longer than most data commands."""
    if name in __all__:
        from nar_t2i.data import captioned

        return getattr(captioned, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
