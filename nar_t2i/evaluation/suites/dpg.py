"""DPG-Bench (Hu et al. 2024, arXiv 2403.05135). Formats as in dpg_bench/ of github.com/TencentQQGYLab/ELLA:

prompts   a folder of texts, a prompt each: 0.txt, partiprompts12.txt, …
pictures  four of a prompt as one picture of 2 × 2, named like the text: 0.png
results   the text that compute_dpg_bench.py writes: a line a picture (path, a score each, their mean), then scores by
          category and "DPG-Bench score"
"""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from nar_t2i.errors import UserError
from nar_t2i.evaluation.suites.suite import Item, Scores, Suite, finite_number, read_text, whole

_PICTURE = re.compile(r"^(?P<path>.+?)(?P<scores>(?:, -?[\d.]+(?:e-?\d+)?)+)$")
_NUMPY = re.compile(r"np\.float\d+\(([^()]*)\)")  # how some versions of NumPy write a number
_LEVELS = {"L1 category scores:": "", "L2 category scores:": "L2 "}


class DpgBench(Suite):
    name = "dpg"

    def read(self, path: Path) -> list[Item]:
        if not path.is_dir():
            raise UserError(f"{path}: must be the folder of DPG-Bench's prompts, a .txt each")
        # The program knows a picture by its name up to the first dot.
        return whole([Item(read_text(file).strip(), file.name.split(".")[0]) for file in sorted(path.glob("*.txt"))], path)

    def files(self, item: Item, index: int, pictures: int) -> dict[str, list[int]]:
        if pictures not in (1, 4):
            raise UserError(f"dpg: takes 1 or 4 pictures of a prompt, not {pictures}")
        return {f"{item.place}.png": list(range(pictures))}

    def image(self, images: list[Image.Image]) -> Image.Image:
        if len(images) == 1:
            return images[0]
        width, height = images[0].size
        grid = Image.new("RGB", (2 * width, 2 * height))
        for index, image in enumerate(images):
            grid.paste(image, (index % 2 * width, index // 2 * height))
        return grid

    def ingest(self, path: Path) -> Scores:
        scores: dict[str, float] = {}
        pictures: dict[str, float] = {}
        level = None
        for count, line in enumerate(read_text(path).splitlines(), 1):
            where = f"{path}:{count}"
            name, colon, value = line.strip().rpartition(": ")
            if line.strip() in _LEVELS:
                level = _LEVELS[line.strip()]
            elif name == "DPG-Bench score" or (line.startswith("\t") and colon and level is not None):
                key = "overall" if name == "DPG-Bench score" else level + name
                if key in scores:
                    raise UserError(f"{where}: {name} for the second time: the results of several runs; keep the lines of one")
                scores[key] = finite_number(value, where)
            elif level is None and (found := _PICTURE.match(_NUMPY.sub(r"\1", line))):
                pictures[found["path"]] = finite_number(found["scores"].rpartition(", ")[2], where)
        if not scores and not pictures:
            raise UserError(f"{path}: holds no result of compute_dpg_bench.py")
        if "overall" not in scores:
            raise UserError(f"{path}: holds no line 'DPG-Bench score', with which compute_dpg_bench.py ends")
        overall, mean = scores.pop("overall"), 100 * sum(pictures.values()) / max(1, len(pictures))
        if pictures and abs(mean - overall) > 0.01:
            raise UserError(f"{path}: says {overall:.4f}, but its {len(pictures)} pictures have a mean of {mean:.4f}")
        return Scores({"overall": overall, **scores}, {"prompts": len(pictures)}, "percent; overall: the mean over prompts")
