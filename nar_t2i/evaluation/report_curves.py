"""The curves of a run, from its metrics.csv: read, and drawn as small SVG pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nar_t2i.errors import UserError
from nar_t2i.evaluation.report_html import Markup, embedded, tag

# What belongs into one chart. Every other column gets a chart of its own, so that a new strategy's terms are seen.
CHARTS = (
    ("Loss", ("loss", "validation_loss")),
    ("Reconstruction loss", ("reconstruction_loss",)),
    ("PSNR, dB", ("psnr",)),
    ("SSIM", ("ssim",)),
    ("Codebook use", ("codebook_use", "batch_codebook_use")),
    ("Codebook perplexity", ("codebook_perplexity",)),
    ("Discriminator", ("discriminator_loss", "discriminator_real", "discriminator_fake")),
    ("Learning rate", ("learning_rate",)),
    ("Gradient norm", ("gradient_norm",)),
    ("Images a second", ("images_per_second",)),
    ("Tokens a second", ("tokens_per_second",)),
    ("Shares of the time", ("data_wait", "goodput")),
    ("Memory, GiB", ("memory_gib",)),
)
COLORS = ("#2f6fde", "#d9622b", "#12805c")
LARGEST = 1e300  # matplotlib's axes overflow beyond
SMOOTHED_FROM = 60  # points; fewer are drawn as they are

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


def read_curves(path: Path) -> dict[str, Curve]:
    """Each column of a metrics.csv, at the steps where it has a finite value. Columns without any are left out."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a run's metrics: {error}") from error
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        step = _number(row.pop("step", None))
        for name, text in row.items():
            value = _number(text)
            if name and name != "epoch" and step is not None and value is not None:
                found.setdefault(name, []).append((step, value))
    return {name: (np.array(points)[:, 0], np.array(points)[:, 1]) for name, points in found.items()}


def _number(text: object) -> float | None:
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return value if abs(value) <= LARGEST else None  # no number is not


def charts(curves: dict[str, Curve]) -> Markup | None:
    """All curves of a run as a grid of charts; None where there are none."""
    cards = [
        tag("div", tag("b", title, class_="small"), _chart(title, chosen), class_="card") for title, chosen in _grouped(curves)
    ]
    return tag("div", cards, class_="charts") if cards else None


def _grouped(curves: dict[str, Curve]) -> Iterator[tuple[str, dict[str, Curve]]]:
    rest = dict(curves)
    for title, names in CHARTS:
        if chosen := {name: rest.pop(name) for name in names if name in rest}:
            yield title, chosen
    for name, curve in rest.items():
        yield name.replace("_", " ").capitalize(), {name: curve}


def _chart(title: str, curves: dict[str, Curve]) -> Markup:
    # A salt makes the identifiers, and with them the file, the same each time.
    settings = {"svg.hashsalt": "nar_t2i", "font.size": 8.5, "font.family": "sans-serif", "text.parse_math": False}
    with matplotlib.rc_context(settings):
        drawing = Figure(figsize=(3.4, 2.1))
        axes = drawing.add_axes((0.125, 0.11, 0.835, 0.79))  # matplotlib's own layouts take longer than the drawing
        for color, (name, (steps, values)) in zip(COLORS, curves.items(), strict=False):
            _line(axes, steps, values, name.replace("_", " "), color)
        axes.margins(x=0.02)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c4cad3")
        axes.tick_params(colors="#667085", width=0.6)
        axes.grid(alpha=0.6, linewidth=0.5, color="#e4e7ec")
        everything = np.concatenate([values for _, values in curves.values()])
        if "loss" in title.lower() and everything.min() > 0 and everything.max() > 20 * everything.min():
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", scilimits=(-2, 4))
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=7.5, labelcolor="#475467")
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    return embedded(buffer.getvalue(), "image/svg+xml", f"{title} over training steps")


def _line(axes: matplotlib.axes.Axes, steps: np.ndarray, values: np.ndarray, label: str, color: str) -> None:
    """A few points with marks; many as a pale line under their running mean."""
    if len(values) < SMOOTHED_FROM:
        axes.plot(steps, values, color=color, linewidth=1.4, marker="o", markersize=2.2, label=label)
        return
    width = max(3, len(values) // 40)
    mean = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.35)
    axes.plot(steps[width // 2 : width // 2 + len(mean)], mean, color=color, linewidth=1.5, label=label)
