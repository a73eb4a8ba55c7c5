"""What a report is made of: tags that escape their text, tables, pictures inside the file, one page around them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

# No script and no request, whatever a run's files hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
VOID = ("img", "meta", "br")
LARGEST_PICTURE = 1600  # pixels a side; larger ones are shrunk, so that the file stays small enough for a phone

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #667085; --line: #e4e7ec; --blue: #2f6fde; --paper: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 8px 0 4px; overflow-wrap: anywhere; }
h2, h3, p, summary { overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 12px; }
h3 { font-size: 1rem; margin: 20px 0 8px; color: var(--soft); font-weight: 600; }
p, .note { margin: 4px 0 12px; color: var(--soft); max-width: 75ch; }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.card, .tile, details { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 12px 16px; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(155px, 1fr)); }
.tile { padding: 12px 14px; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span, .small { font-size: .8rem; color: var(--soft); line-height: 1.35; }
.tile span { display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
thead th { font-size: .8rem; color: var(--soft); font-weight: 600; }
tbody tr:last-child td { border-bottom: 0; }
tr.total td { font-weight: 650; }
td .small { display: block; font-weight: 400; white-space: nowrap; }
.plain td, .plain th { text-align: left; overflow-wrap: anywhere; }
.plain td:first-child { white-space: nowrap; color: var(--soft); width: 1%; }
.meter { display: block; height: 4px; border-radius: 2px; background: var(--line); margin-top: 4px; min-width: 64px; }
.meter i { display: block; height: 4px; border-radius: 2px; background: var(--blue); }
.meter.quiet i { background: #98a2b3; }
.charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); }
figure { margin: 0; }
figcaption { font-size: .8rem; color: var(--soft); padding-top: 4px; line-height: 1.35; overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
img.pixels { image-rendering: pixelated; }
.samples { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); }
.samples.two { grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }
.pair { display: flex; gap: 6px; }
.pair > div { flex: 1; min-width: 0; }
.good, .bad { font-weight: 700; }
.good { color: #12805c; } .bad { color: #c0362c; }
.stack { display: flex; height: 14px; border-radius: 7px; overflow: hidden; margin: 6px 0 12px; }
ol.prompts { font-size: .8rem; color: var(--soft); columns: 2 220px; padding-left: 1.6em; margin: 8px 0 0; }
details { padding: 10px 16px; margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; margin: 10px 0 4px; }
@media (max-width: 600px) { main { padding: 16px 12px 48px; } th, td { padding: 6px; } .tile b { font-size: 1.35rem; }
  .tiles { grid-template-columns: 1fr 1fr; } .samples.two { grid-template-columns: 1fr 1fr; } .card { padding: 10px; } }
"""


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: Any, **attributes: str | None) -> Markup:
    """An element. Text is escaped; None is left out; `class_` is the attribute `class`."""
    written = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items() if value is not None)
    inner = "" if name in VOID else f"{join(children)}</{name}>"
    return Markup(f"<{name}{written}>{inner}")


def join(children: Iterable[Any]) -> Markup:
    """Elements and text in a row; iterables inside are flattened."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(str(child))
        elif isinstance(child, str) or not isinstance(child, Iterable):
            parts.append(html.escape(str(child)))
        else:
            parts.append(join(child))
    return Markup("".join(parts))


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], total: bool = False, class_: str | None = None) -> Markup:
    """A table that scrolls sideways on a narrow screen. total: the last row is a sum. No head where `head` is empty."""
    rows = list(rows)
    body = [
        tag("tr", [tag("td", cell) for cell in row], class_="total" if total and index == len(rows) - 1 else None)
        for index, row in enumerate(rows)
    ]
    top = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])) if head else None
    return tag("div", tag("table", top, tag("tbody", body), class_=class_), class_="wide card")


def meter(share: float, quiet: bool = False) -> Markup:
    """A thin bar, filled to `share` of its width."""
    width = 100 * min(max(share, 0.0), 1.0)
    return tag("span", tag("i", style=f"width:{width:.1f}%"), class_="meter quiet" if quiet else "meter")


def picture(path: Path, alt: str) -> Markup | None:
    """A picture file as part of the page, as PNG; None where it cannot be read as one. Small ones keep hard pixels."""
    try:
        with Image.open(path) as image:
            image.load()
            image = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    if max(image.size) > LARGEST_PICTURE:
        image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    # Between a small and a large picture hard pixels turn to moiré when a grid of them is shrunk.
    style = "pixels" if max(image.size) <= 128 else None
    return embedded(buffer.getvalue(), "image/png", alt, style)


def embedded(content: bytes, kind: str, alt: str, class_: str | None = None) -> Markup:
    """An image element that carries its bytes. kind: its MIME type."""
    return tag("img", src=f"data:{kind};base64,{base64.b64encode(content).decode()}", alt=alt, class_=class_)


def figure(image: Markup | None, *caption: Any) -> Markup | None:
    return None if image is None else tag("figure", image, tag("figcaption", *caption) if caption else None)


def section(title: str, *content: Any) -> Markup | None:
    """A headed part of the page; None where it would be empty."""
    inner = join(content)
    return tag("section", tag("h2", title), inner) if inner else None


def page(title: str, *content: Any) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("title", title),
        Markup(f"<style>{STYLE}</style>"),
    )
    body = tag("body", tag("main", *content))
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'
