"""Looking into JSON that something else wrote, where anything may be missing or of another kind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any


def value_at(content: Any, *keys: str) -> Any:
    """content[key][key]…, or None where one is missing."""
    for key in keys:
        if not isinstance(content, Mapping):
            return None
        content = content.get(key)
    return content


def mapping_at(content: Any, *keys: str) -> Mapping[str, Any]:
    """content[key][key]…, or an empty mapping where there is none."""
    value = value_at(content, *keys)
    return value if isinstance(value, Mapping) else {}


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def numbers_of(content: Any) -> Iterator[tuple[str, float]]:
    """The finite numbers of a mapping, by their keys."""
    yield from ((key, value) for key, value in mapping_at(content).items() if is_number(value))
