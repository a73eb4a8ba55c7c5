"""Captioned images → batches."""

from nar_t2i.data.captioned import CaptionedImages, Weighted

__all__ = ["CaptionedImages", "Weighted"]
