"""Suites of other programs: prompts in, pictures in their layout, results back; `nar-t2i suite`."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nar_t2i.cli import SUITES as ON_THE_COMMAND_LINE
from nar_t2i.cli import main
from nar_t2i.errors import UserError
from nar_t2i.evaluation.suites import SUITES
from nar_t2i.evaluation.suites.t2i_compbench import LONGEST
from nar_t2i.pipeline import TextToImage
from tests.tiny_pipeline import tiny_pipeline

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "clock", "count": 4}], "exclude": [], "prompt": "a photo of four clocks"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [], "prompt": "a photo of two cows"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, and the prompts of each suite as their authors have them, three each."""
    folder = tmp_path_factory.mktemp("suites")
    tiny_pipeline(folder).save_pretrained(folder / "model")
    (folder / "geneval").write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    (folder / "dpg").mkdir()
    for name in ("0", "partiprompts12", "stanford3"):
        (folder / f"dpg/{name}.txt").write_text(f"a long text about {name}.\n")
    (folder / "t2i-compbench").write_text("a green bench and a blue bowl\tcolor\na red book.\nA blue vase and a red cup\n")
    (folder / "hpsv2").mkdir()
    for style in ("anime", "concept-art", "paintings", "photo"):
        (folder / f"hpsv2/{style}.json").write_text(json.dumps([f"{style} of a cat"]))
    return folder


def draw(place: Path, out: Path, name: str, *options: str) -> int:
    return main(
        ["suite", "draw", name, str(place / "model"), "--prompts", str(place / name), "--out", str(out), "--steps", "2", *options]
    )


def inside(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_all_suites_are_on_the_command_line():
    assert tuple(SUITES) == ON_THE_COMMAND_LINE


LAYOUTS = {
    "geneval": {f"{n:05d}/{file}" for n in range(3) for file in ("metadata.jsonl", *(f"samples/{k:04d}.png" for k in range(4)))},
    "dpg": {"0.png", "partiprompts12.png", "stanford3.png"},
    "t2i-compbench": {
        f"samples/{prompt}_{10 * n + k:06d}.png" for k in range(10)
        for n, prompt in enumerate(("a green bench and a blue bowl", "a red book.", "A blue vase and a red cup"))
    },
    "hpsv2": {f"{style}/00000.jpg" for style in ("anime", "concept-art", "paintings", "photo")},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_what_the_programs_read_and_nothing_else(place, tmp_path, name):
    assert draw(place, tmp_path / "out", name) == 0
    assert inside(tmp_path / "out") == LAYOUTS[name]
    t2i = TextToImage.from_pretrained(place / "model")
    items, number = SUITES[name].read(place / name), SUITES[name].pictures
    drawn = (
        t2i.sample([items[1].prompt] * number, steps=2, seed=[number + k for k in range(number)]).images.permute(0, 2, 3, 1).numpy()
    )
    if name == "geneval":
        assert (tmp_path / "out/00001/metadata.jsonl").read_text() == json.dumps(GENEVAL[1])
        assert all((pixels(tmp_path / f"out/00001/samples/{k:04d}.png") == drawn[k]).all() for k in range(4))
    if name == "dpg":  # left to right, then down, as compute_dpg_bench.py cuts it
        grid = pixels(tmp_path / "out/partiprompts12.png")
        assert grid.shape == (32, 32, 3)
        cut = [grid[:16, :16], grid[:16, 16:], grid[16:, :16], grid[16:, 16:]]
        assert all((one == other).all() for one, other in zip(cut, drawn, strict=True))
    if name == "t2i-compbench":  # its programs sort by the number and take the prompt up to the first underscore
        files = sorted((tmp_path / "out/samples").iterdir(), key=lambda file: int(file.name.split("_")[-1].split(".")[0]))
        assert [file.name.split("_")[0] for file in files[::10]] == [item.prompt for item in items]
        assert (pixels(files[13]) == drawn[3]).all()
    if name == "hpsv2":
        assert Image.open(tmp_path / "out/concept-art/00000.jpg").format == "JPEG"
        assert np.abs(pixels(tmp_path / "out/concept-art/00000.jpg").astype(int) - drawn[0]).mean() < 12


def test_the_longest_prompt_is_a_file_s_name(place, tmp_path):
    prompt = "a" * LONGEST
    (tmp_path / "prompts.txt").write_text(f"{prompt}\n")
    line = [
        "suite",
        "draw",
        "t2i-compbench",
        str(place / "model"),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--pictures",
        "1",
        "--steps",
        "1",
    ]
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    assert inside(tmp_path / "out") == {f"samples/{prompt}_000000.png"}


def test_drawing_goes_on_and_other_settings_are_refused(place, tmp_path, capsys):
    assert draw(place, tmp_path / "out", "geneval", "--batch-size", "4") == 0
    lost = tmp_path / "out/00002/samples/0003.png"
    expected = lost.read_bytes()
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for n in (0, 1) for path in (tmp_path / f"out/0000{n}").rglob("*.png")}
    assert draw(place, tmp_path / "out", "geneval") == 0
    assert lost.read_bytes() == expected and all(path.stat().st_mtime_ns == time for path, time in before.items())
    capsys.readouterr()
    assert draw(place, tmp_path / "out", "geneval", "--seed", "5") == 2
    assert "was made with seed 0, and now it is 5" in capsys.readouterr().err
    (tmp_path / "out.work/settings.json").unlink()
    assert draw(place, tmp_path / "out", "geneval", "--seed", "5") == 2
    assert "nothing says what drew them" in capsys.readouterr().err and lost.read_bytes() == expected
    assert draw(place, tmp_path / "other", "geneval", "--steps", "0") == 2  # before anything was drawn
    assert draw(place, tmp_path / "other", "geneval", "--steps", "2") == 0


@pytest.mark.parametrize("name, options, said", [
    ("dpg", ["--pictures", "3"], "dpg: takes 1 or 4 pictures of a prompt, not 3"),
    ("hpsv2", ["--pictures", "2"], "hpsv2: takes 1 picture"), ("geneval", ["--pictures", "0"], "must be at least 1"),
    ("geneval", ["--weights", "raw"], "is a model folder"), ("geneval", ["--weights", "both"], "one kind of weights at a time"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_said(place, tmp_path, capsys, name, options, said):
    assert draw(place, tmp_path / "out", name, *options) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content, said", [
    ("geneval", '{"tag": "x"}\n', r"file:1: key 'prompt' is missing"), ("geneval", "{\n", "file:1: is not JSON"),
    ("geneval", '{"tag": "a", "prompt": null}', "file:1: key 'prompt' must be a text, not None"),
    ("geneval", "", "holds no prompt"), ("dpg", "a text", "must be the folder of DPG-Bench's prompts"),
    ("t2i-compbench", "left/right\n", "cannot be part of a file's name"),
    ("t2i-compbench", "a_b under a c\n", "cannot be part of a file's name"), ("t2i-compbench", "\n", "holds no prompt"),
    ("hpsv2", '{"a": 1}', "must be a list of prompts"), ("hpsv2", '["a", " "]', "has no prompt"),
])  # fmt: skip
def test_wrong_prompts_are_named(tmp_path, name, content, said):
    (tmp_path / "file").write_text(content)
    with pytest.raises(UserError, match=said):
        SUITES[name].read(tmp_path / "file")


# ---- results ---------------------------------------------------------------------------------------------------------


def ingest(tmp_path: Path, name: str, results: Path) -> dict:
    assert main(["suite", "ingest", name, str(results), "--out", str(tmp_path / "scores.json")]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["kind"] == "suite" and found["suite"] == name
    return found


def test_geneval_is_the_mean_of_its_tasks(tmp_path):
    """Not of its pictures: the tasks have different numbers of prompts."""
    rows = [(0, True), (0, True), (0, False), (0, False), (1, False), (1, False), (1, True), (1, False), *[(2, False)] * 4]
    lines = [json.dumps({"filename": f"{k}.png", "tag": GENEVAL[n]["tag"], "prompt": GENEVAL[n]["prompt"], "correct": right,
                         "reason": "", "metadata": json.dumps(GENEVAL[n])}) for k, (n, right) in enumerate(rows)]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    scores = ingest(tmp_path, "geneval", tmp_path / "results.jsonl")["scores"]
    assert scores["single_object"] == 0.5 and scores["counting"] == 1 / 8 and scores["overall"] == (0.5 + 1 / 8) / 2
    assert scores["images"] == 3 / 12 and scores["prompts"] == 2 / 3


@pytest.mark.parametrize(("change", "said"), [
    ({"filename": "0.png"}, "filename '0.png': stands twice"), ({"tag": "overall"}, "tag 'overall': is none of GenEval's")
])  # fmt: skip
def test_pictures_that_geneval_names_twice_and_tags_that_it_has_not_are_refused(tmp_path, change, said):
    row = {"filename": "0.png", **{key: GENEVAL[0][key] for key in ("tag", "prompt")}, "correct": True}
    (tmp_path / "results.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps({**row, 'filename': '1.png', **change})}\n")
    with pytest.raises(UserError, match=said):
        SUITES["geneval"].ingest(tmp_path / "results.jsonl")


@pytest.mark.parametrize(("rows", "said"), [
    ([{"question_id": 3, "answer": "0.5"}] * 2, "question 3 stands twice"),
    ([{"question_id": 3, "answer": "64.5"}], "the answer 64.5 is no score of a picture"),
])  # fmt: skip
def test_answers_that_t2i_compbench_never_gives_are_refused(tmp_path, rows, said):
    (tmp_path / "vqa_result.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=said):
        SUITES["t2i-compbench"].ingest(tmp_path / "vqa_result.json")
    with pytest.raises(UserError, match="nowhere: does not exist"):
        SUITES["t2i-compbench"].ingest(tmp_path / "nowhere")


def test_results_are_not_written_over(tmp_path, capsys):
    (tmp_path / "results.txt").write_text(HPS)
    assert main(["suite", "ingest", "hpsv2", str(tmp_path / "results.txt"), "--out", str(tmp_path / "results.txt")]) == 2
    assert "results.txt: is a file of something else" in capsys.readouterr().err
    assert (tmp_path / "results.txt").read_text() == HPS


@pytest.mark.parametrize("correct", ["false", None, 2])
def test_what_geneval_never_writes_is_not_taken_for_right_or_wrong(tmp_path, correct):
    line = json.dumps({"filename": "0.png", **{key: GENEVAL[0][key] for key in ("tag", "prompt")}, "correct": correct})
    (tmp_path / "results.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=f"results.jsonl: correct must be true or false, not {correct!r}"):
        SUITES["geneval"].ingest(tmp_path / "results.jsonl")


DPG = """/images/0.png, 1.0, 0.5, 0.75, 0.75, 0.75
/images/a, b.png, 0.5, 0.5, 0.5, 0.5, 0.5
Model: images
L1 category scores:
\tentity: 70.5
\trelation: 55.0
L2 category scores:
\tentity - whole: 70.5
Image path: /images
Save results to: results.txt
DPG-Bench score: 62.5
"""


def test_dpg_reads_its_summary_and_checks_it(tmp_path):
    path = tmp_path / "results.txt"
    path.write_text(DPG)
    found = ingest(tmp_path, "dpg", path)
    assert found["scores"] == {"overall": 62.5, "entity": 70.5, "relation": 55.0, "L2 entity - whole": 70.5}
    assert found["counts"] == {"prompts": 2}
    path.write_text(DPG.replace("0.75\n", "0.95\n"))
    with pytest.raises(UserError, match="says 62.5000, but its 2 pictures have a mean of 72.5000"):
        SUITES["dpg"].ingest(path)
    for stopped in ("\n".join(DPG.splitlines()[:2]), DPG[:70], "\n".join(DPG.splitlines()[:-1])):  # before its summary's end
        path.write_text(stopped)
        with pytest.raises(UserError, match="holds no line 'DPG-Bench score'"):
            SUITES["dpg"].ingest(path)
    path.write_text(DPG + DPG)
    with pytest.raises(UserError, match="entity for the second time: the results of several runs"):
        SUITES["dpg"].ingest(path)
    path.write_text("nothing\n")
    with pytest.raises(UserError, match="holds no result"):
        SUITES["dpg"].ingest(path)


def test_t2i_compbench_reads_each_way_of_judging_of_each_category(tmp_path):
    results = {
        "color/annotation_blip": ["0.5000", "0.7000"],
        "spatial/annotation_obj_detection": [0.25],
        "complex/annotation_3_in_1": [0.4],
    }
    for place, answers in results.items():
        (tmp_path / "out" / place).mkdir(parents=True)
        rows = [{"question_id": n, "answer": answer} for n, answer in enumerate(answers)]
        (tmp_path / "out" / place / "vqa_result.json").write_text(json.dumps(rows))
    inner = tmp_path / "out/color/annotation1_blip/VQA/result"  # of the first noun phrase alone
    inner.mkdir(parents=True)
    (inner / "vqa_result.json").write_text('[{"question_id": 0, "answer": "0.9"}]')
    found = ingest(tmp_path, "t2i-compbench", tmp_path / "out")
    assert found["scores"] == {"color/blip": pytest.approx(0.6), "complex/3_in_1": 0.4, "spatial/obj_detection": 0.25}
    assert found["counts"]["color/blip"] == 2
    assert SUITES["t2i-compbench"].ingest(tmp_path / "out/color").scores == {"blip": pytest.approx(0.6)}
    file = tmp_path / "out/color/annotation_blip/vqa_result.json"
    assert SUITES["t2i-compbench"].ingest(file).scores == {"blip": pytest.approx(0.6)}
    file.write_text('[{"question_id": 4, "answer": "yes"}]')
    with pytest.raises(UserError, match="question 4: 'yes' is not a number"):
        SUITES["t2i-compbench"].ingest(file)
    with pytest.raises(UserError, match="holds no annotation_"):
        SUITES["t2i-compbench"].ingest(inner)


HPS = """Loading model ...
-----------benchmark score ----------------
mine anime           27.34 \t 0.1512
mine concept-art     26.50 \t 0.1000
mine paintings       26.30 \t 0.2000
mine photo           27.00 \t 0.3000
mine Average         26.79 \t
"""


def test_some_of_hpsv2_s_styles_are_no_whole(tmp_path):
    (tmp_path / "some.txt").write_text("sd anime 29.34 0.15\n")
    assert SUITES["hpsv2"].ingest(tmp_path / "some.txt").scores == {"anime": 29.34}


def test_hpsv2_reads_what_it_prints_and_scores_one_by_one(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(HPS)
    found = ingest(tmp_path, "hpsv2", path)
    assert found["scores"] == {"overall": 26.79, "anime": 27.34, "concept-art": 26.5, "paintings": 26.3, "photo": 27.0}
    path.write_text("\n".join(HPS.splitlines()[:-1]))
    assert SUITES["hpsv2"].ingest(path).scores["overall"] == pytest.approx((27.34 + 26.5 + 26.3 + 27) / 4)
    path.write_text(json.dumps({"anime": [0.27, 0.29], "photo": [0.25]}))
    scores = SUITES["hpsv2"].ingest(path)
    assert scores.scores == pytest.approx({"overall": 26.5, "anime": 28.0, "photo": 25.0}) and scores.counts == {
        "anime": 2,
        "photo": 1,
    }
    for content, said in (
        (HPS + HPS, "holds anime twice: the scores of several models"),
        (HPS.replace("26.79", "96.79"), "says 96.79, but its styles have a mean of 26.79"),
        (HPS.replace("26.50", "nan"), "is not a finite number"),
        (HPS.replace("26.50", "-3.00"), "is no score in percent"),
        ('{"anime": [0.27], "anime": [0.1]}', "key anime: stands twice"),
        ("mine anime 0.2734 \t 0.1\n", "is no score in percent"),
        ("no score\n", "holds no score"),
        ('{"oil": [1]}', "key oil: must be one of"),
        ("{", "not JSON"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            SUITES["hpsv2"].ingest(path)
