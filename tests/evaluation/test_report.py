"""The report of a folder: what appears, that it is one harmless file, and what missing or wrong parts do."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from nar_t2i.cli import main
from nar_t2i.errors import UserError
from nar_t2i.evaluation import report
from nar_t2i.evaluation.report import write_report
from nar_t2i.evaluation.report_curves import read_curves
from nar_t2i.evaluation.scene_prompts import CATEGORIES

VOID = {"img", "meta", "br"}
EVIL = '<script>alert("x")</script>'


def scores(value: float, **more) -> dict:
    names = (*CATEGORIES, "overall")
    return {
        **dict.fromkeys(names, value), "interval": {n: [value - 0.05, value + 0.05] for n in names},
        "count": dict.fromkeys(CATEGORIES, 200), **more,
    }  # fmt: skip


METRICS = {
    "tokenizer": {"psnr": 27.43, "codebook_use": 0.91, "detector_ratio": 0.978},
    "generator": {
        "scene_accuracy": {
            "seen": scores(0.812), "held_out": scores(0.634),
            "shuffled": scores(0.017, chance={"derangement": dict.fromkeys((*CATEGORIES, "overall"), 0.0123)}),
        },
        "decoder_passes": 16, "decoder_rows": 32, "steps": 16, "guidance_scale": 3.0,
    },
    "shipped": {"scene_accuracy": {"seen": scores(0.951), "held_out": scores(0.801)}},
    "wall_seconds": {"install": 70.0, "data": 60.0, "tokenizer": 225.0, "generator": 435.0, "total": 790.0},
    "machine": {"processor": "two cores of a test"},
}  # fmt: skip


def write_run(folder: Path, rows: list[str], config: str = "model: {}\n", pictures: tuple[str, ...] = ()) -> None:
    (folder / "pictures").mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "config.yaml").write_text(config)
    versions = {"nar_t2i": "0.1", "platform": "Linux-of-a-test", "packages": {"torch": "2.99.0"}}
    (folder / "versions.json").write_text(json.dumps(versions))
    for name in pictures:
        Image.new("RGB", (40, 20), "red").save(folder / "pictures" / name)


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    folder = tmp_path / "qs"
    steps = [f"{step},0,{2 / (step + 1)},,{1e-3 * step}" for step in range(0, 2000, 20)]
    write_run(
        folder / "generator", ["step,epoch,loss,validation_loss,learning_rate", *steps, "2000,0,,0.5,"],
        config=f"model: {{init_args: {{sample_prompts: [a red circle, '{EVIL}']}}}}\n",
        pictures=("samples-00000500.png", "samples-00001000.png", "samples-00002000.png"),
    )  # fmt: skip
    write_run(
        folder / "tokenizer", ["step,epoch,psnr,codebook_use,novel_term", "10,0,21.5,0.5,1", "20,0,24.0,0.9,nan"],
        pictures=("reconstructions-00000020.png",),
    )  # fmt: skip
    (folder / "evaluation/samples").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    settings = {"settings": {"scale": "shortened", "shuffled_captions": False}, "seconds": {"data": 3.25}}
    (folder / "stages.json").write_text(json.dumps(settings))
    entries = []
    for model in ("quickstart", "shipped"):
        for index, prompt in enumerate(("two blue squares", f"a star {EVIL}")):
            file = f"samples/{model}-{index}.png"
            Image.new("RGB", (64, 64), (0, 0, 200 + index)).save(folder / "evaluation" / file)
            entries.append({"file": file, "prompt": prompt, "category": "counting", "passed": index == 0,
                            "set": "seen", "model": model})  # fmt: skip
    (folder / "evaluation/samples.json").write_text(json.dumps(entries))
    return folder


class Page(HTMLParser):
    """Checks that tags close in order; keeps text, tags and the attributes of each element."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def images_of(page: Page) -> list[tuple[str, str, bytes]]:
    """(alt, kind, bytes) of every picture."""
    found = []
    for tag, attributes in page.elements:
        if tag == "img":
            kind, content = re.fullmatch(r"data:(image/[a-z+]+);base64,(.+)", attributes["src"]).groups()
            found.append((attributes["alt"], kind, base64.b64decode(content, validate=True)))
    return found


def test_headline_values_and_tables_appear(quickstart: Path) -> None:
    text = page_of(quickstart).text
    for value in ("0.812", "0.634", "0.017", "0.012", "0.951", "0.801", "27.4 dB", "91%", "0.978", "0.762 to 0.862"):
        assert value in text, value
    for words in ("color attribution", "Held-out combinations", "Chance", "13.2 min", "n=200", "row evaluations"):
        assert words in text, words
    assert "nar-t2i quickstart --shortened" in text and "--shuffled-captions" not in text
    assert "two cores of a test" in text and "Linux-of-a-test" in text and "2.99.0" in text and "sample_prompts" in text


def test_pictures_and_plots_are_whole(quickstart: Path) -> None:
    images = images_of(page_of(quickstart))
    alts = [alt for alt, _, _ in images]
    for _, kind, content in images:
        if kind == "image/png":
            Image.open(io.BytesIO(content)).load()
        else:
            assert kind == "image/svg+xml"
            assert ElementTree.fromstring(content).tag.endswith("svg")
    assert "samples-00000500" in alts and "samples-00002000" in alts, "the first and the last grid"
    assert "samples-00001000" not in alts
    assert "reconstructions-00000020" in alts
    charts = {alt.removesuffix(" over training steps") for alt, kind, _ in images if kind == "image/svg+xml"}
    assert charts == {"Loss", "Learning rate", "PSNR, dB", "Codebook use", "Novel term"}
    blue = [Image.open(io.BytesIO(content)) for alt, _, content in images if alt == "two blue squares"]
    assert len(blue) == 2 and blue[0].getpixel((5, 5)) == (0, 0, 200)


def test_models_stand_side_by_side(quickstart: Path) -> None:
    text = page_of(quickstart).text
    assert re.search(r"✓\s+quickstart\s*✓\s+shipped\s*two blue squares", text)
    assert re.search(r"✗\s+quickstart\s*✗\s+shipped\s*a star", text)


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(quickstart: Path) -> None:
    page = page_of(quickstart)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            assert name not in ("src", "href", "srcset", "action") or value.startswith("data:"), value
    style = re.search(r"<style>(.*?)</style>", (quickstart / "report.html").read_text(), re.S).group(1)
    assert "url(" not in style and "@import" not in style
    policy = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0].startswith("default-src 'none'")


def test_text_of_files_is_escaped(quickstart: Path) -> None:
    (quickstart / "generator/versions.json").write_text(json.dumps({EVIL: EVIL}))
    (quickstart / "generator/metrics.csv").write_text(f'step,"{EVIL.replace(chr(34), "")}"\n1,2\n')
    page = page_of(quickstart)
    assert EVIL not in (quickstart / "report.html").read_text()
    assert page.text.count(EVIL) >= 4, "shown as text: the sample's prompt, the grid's, the configuration, the versions"


def test_the_same_folder_gives_the_same_bytes(quickstart: Path) -> None:
    assert write_report(quickstart).read_bytes() == write_report(quickstart).read_bytes()


@pytest.mark.parametrize("missing", [
    "metrics.json", "stages.json", "evaluation", "evaluation/samples.json", "evaluation/samples/shipped-0.png",
    "tokenizer", "generator", "generator/config.yaml", "generator/versions.json", "generator/pictures",
])  # fmt: skip
def test_missing_parts_are_left_out(quickstart: Path, without_charts: None, missing: str) -> None:
    path = quickstart / missing
    for inner in [*sorted(path.rglob("*"), reverse=True), path]:
        inner.rmdir() if inner.is_dir() else inner.unlink()
    assert "Configuration" in page_of(quickstart).text


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes longest, and has no part in a test."""
    monkeypatch.setattr(report, "charts", lambda curves: None)


@pytest.mark.parametrize("name", ["metrics.json", "stages.json", "evaluation/samples.json", "generator/versions.json"])
@pytest.mark.parametrize("content", ["[1, 2", "3", "[]", '"text"', "[3]"])
def test_wrong_json_is_an_error_that_names_the_file_or_is_left_out(
    quickstart: Path, without_charts: None, name: str, content: str
) -> None:
    (quickstart / name).write_text(content)
    try:
        page_of(quickstart)
    except UserError as error:
        assert Path(name).name in str(error)


@pytest.mark.parametrize("key, value", [
    ("tokenizer", None), ("generator", 3), ("generator", {"scene_accuracy": {"seen": 3, "shuffled": None}}),
    ("shipped", "?"), ("wall_seconds", {"data": "long"}), ("wall_seconds", {}), ("wall_seconds", {"total": 0}),
    ("generator", {"scene_accuracy": {"seen": {"overall": None, "interval": 3}}}), ("last", {"loss": "x"}),
])  # fmt: skip
def test_metrics_of_another_shape_do_not_crash(quickstart: Path, without_charts: None, key: str, value: object) -> None:
    (quickstart / "metrics.json").write_text(json.dumps({**METRICS, key: value}))
    page_of(quickstart)


def test_pictures_outside_the_folder_and_broken_ones_are_not_shown(quickstart: Path) -> None:
    Image.new("RGB", (8, 8)).save(quickstart / "secret.png")
    (quickstart / "evaluation/broken.png").write_bytes(b"\x89PNG broken")
    files = ("../secret.png", str(quickstart / "secret.png"), "broken.png", "absent.png", "samples")
    entries = [{"file": file, "prompt": f"prompt {file}", "passed": None} for file in files]
    (quickstart / "evaluation/samples.json").write_text(json.dumps(entries))
    page = page_of(quickstart)
    assert page.text.count("no picture") == len(files)
    assert not [alt for alt, _, _ in images_of(page) if alt.startswith("prompt")]


def test_a_single_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(tmp_path / "run", ["step,epoch,loss,psnr", "0,0,3.0,", "10,0,1.25,20.5"])
    assert main(["report", str(tmp_path / "run")]) == 0
    assert str(tmp_path / "run/report.html") in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics == {"steps": 10, "last": {"loss": 1.25, "psnr": 20.5}}
    text = page_of(tmp_path / "run").text
    assert "1.25" in text and "20.5" in text
    with open(tmp_path / "run/metrics.csv", "a") as file:
        file.write("90,0,0.75,31.5\n")  # it went on
    assert main(["report", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == {"steps": 90, "last": {"loss": 0.75, "psnr": 31.5}}
    assert "31.5" in page_of(tmp_path / "run").text


@pytest.mark.parametrize("settings, command", [
    ({"scale": "full", "shuffled_captions": False}, "nar-t2i quickstart in"),
    ({"scale": "shortened", "shuffled_captions": True}, "nar-t2i quickstart --shortened --shuffled-captions in"),
    ({"scale": "tiny"}, "NAR_T2I_QUICKSTART_SCALE=tiny nar-t2i quickstart in"),
])  # fmt: skip
def test_the_command_is_named(quickstart: Path, without_charts: None, settings: dict, command: str) -> None:
    (quickstart / "stages.json").write_text(json.dumps({"settings": settings}))
    assert f"Made by {command}" in page_of(quickstart).text


def test_missing_metrics_come_from_the_scores_and_the_stages(quickstart: Path) -> None:
    (quickstart / "metrics.json").unlink()
    (quickstart / "evaluation/scores.json").write_text(json.dumps({"tokenizer": METRICS["tokenizer"]}))
    assert main(["report", str(quickstart)]) == 0
    metrics = json.loads((quickstart / "metrics.json").read_text())
    assert metrics == {"tokenizer": METRICS["tokenizer"], "wall_seconds": {"data": 3.2}}


def test_metrics_that_are_there_are_kept(quickstart: Path) -> None:
    before = (quickstart / "metrics.json").read_bytes()
    assert main(["report", str(quickstart)]) == 0
    assert (quickstart / "metrics.json").read_bytes() == before


def test_a_quickstart_that_goes_on_is_reported_anew(quickstart: Path) -> None:
    def told(done: list[str], seconds: dict[str, float]) -> dict:
        (quickstart / "stages.json").write_text(json.dumps({"settings": {}, "seconds": seconds, "done": done}))
        assert main(["report", str(quickstart)]) == 0
        return json.loads((quickstart / "metrics.json").read_text())

    assert told(["data"], {"data": 3.0})["wall_seconds"] == {"data": 3.0}
    assert told(["data", "text"], {"data": 3.0, "text": 4.0})["wall_seconds"] == {"data": 3.0, "text": 4.0}
    (quickstart / "metrics.json").write_text(json.dumps(METRICS))  # as the quickstart ends
    assert told(["data", "text", "evaluation"], {"data": 3.0}) == METRICS


def test_a_run_that_has_not_logged_anything_is_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("model: {}")
    assert main(["report", str(run)]) == 0
    assert "Nothing has been logged yet" in page_of(run).text and json.loads((run / "metrics.json").read_text()) == {}
    write_run(tmp_path / "other", ["step,epoch,loss", "0,0,3.0"])
    assert main(["report", str(run), str(tmp_path / "other"), "--out", str(tmp_path / "both.html")]) == 0
    write_run(run, ["step,epoch,loss", "0,0,2.5"])  # it went on
    assert main(["report", str(run)]) == 0 and "2.5" in page_of(run).text


@pytest.mark.parametrize(("folder", "words"), [("", "neither a run"), ("absent", "does not exist")])
def test_a_folder_that_is_no_run_is_named(tmp_path: Path, folder: str, words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match=words):
        write_report(tmp_path / folder)
    assert main(["report", str(tmp_path / folder)]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / folder) in message and message.count("\n") == 1
    assert not (tmp_path / folder / "report.html").exists()


def test_curves_skip_what_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,loss,empty\n1,0,nan,\n2,0,0.5,\n3,0,inf,\nx,0,1,\n4,0,word,\n5,0,1.7e308,\n")
    curves = read_curves(path)
    assert list(curves) == ["loss"]
    steps, values = curves["loss"]
    assert steps.tolist() == [2] and values.tolist() == [0.5]


def test_metrics_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="metrics.csv"):
        write_report(tmp_path)
