"""T2I-CompBench (Huang et al. 2023, arXiv 2307.06350). Formats as in github.com/Karine-Huang/T2I-CompBench (inference_eval.py,
BLIP_vqa.py, CLIP_similarity.py, 3_in_1.py):

    prompts   a text of one category with a prompt a line, up to the first tab: color_val.txt
    pictures  samples/<prompt>_000000.png, ten of a prompt, numbered through all prompts; programs read the prompt from the name
    results   annotation_<how>/vqa_result.json: [{"question_id": 0, "answer": "0.5312"}, …], a picture each. A folder may hold
              several categories, each in a folder of its own
"""

from __future__ import annotations

from pathlib import Path

from nar_t2i.errors import UserError
from nar_t2i.evaluation.suites.suite import Item, Scores, Suite, finite_number, read_text, whole
from nar_t2i.files import read_json

RESULT = "vqa_result.json"
LONGEST = 240  # bytes of a name, which most file systems end at 255


class T2ICompBench(Suite):
    name = "t2i-compbench"
    pictures = 10

    def read(self, path: Path) -> list[Item]:
        items = []
        for line in read_text(path).splitlines():
            prompt = line.split("\t")[0]
            if not prompt.strip():
                continue
            # They take what stands before the first "_" of a name.
            if any(character in prompt for character in "/\0_") or len(prompt.encode()) > LONGEST:
                raise UserError(f"{path}: {prompt!r} cannot be part of a file's name, where the programs read it")
            items.append(Item(prompt, f"{len(items):06d}"))
        return whole(items, path)

    def files(self, item: Item, index: int, pictures: int) -> dict[str, list[int]]:
        return {f"samples/{item.prompt}_{index * pictures + picture:06d}.png": [picture] for picture in range(pictures)}

    def ingest(self, path: Path) -> Scores:
        # What a program notes of one noun phrase at a time lies deeper, in annotation1_blip/VQA/result.
        if not path.exists():
            raise UserError(f"{path}: does not exist")
        found = [path] if path.is_file() else sorted(p for p in path.rglob(f"annotation_*/{RESULT}"))
        scores, counts = {}, {}
        for file in found:
            place = file.parent.relative_to(path) if path.is_dir() else Path(file.parent.name)
            name = str(place.with_name(place.name.removeprefix("annotation_"))) if place.name else file.stem
            rows = read_json(file)
            if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "answer" in row for row in rows):
                raise UserError(f"{file}: must be a list of objects with a key 'answer'")
            answers = [finite_number(row["answer"], f"{file}: question {row.get('question_id', i)}") for i, row in enumerate(rows)]
            if outside := [answer for answer in answers if not -1 <= answer <= 1]:
                raise UserError(f"{file}: the answer {outside[0]:g} is no score of a picture, of which the highest is 1")
            asked = [str(row["question_id"]) for row in rows if "question_id" in row]
            if len(set(asked)) < len(asked):
                raise UserError(f"{file}: question {next(q for q in asked if asked.count(q) > 1)} stands twice")
            scores[name], counts[name] = sum(answers) / len(answers), len(answers)
        if not scores:
            raise UserError(f"{path}: holds no annotation_*/{RESULT}")
        return Scores(
            scores, counts, "means over pictures, 0 to 1, by category and way of judging; these do not compare with each other"
        )
