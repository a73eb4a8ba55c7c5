"""Reports in a real browser: no errors on the console, every picture loads, nothing is asked for outside the file.

Where no chromium is installed these tests are skipped, unless NAR_T2I_REQUIRE_BROWSER=1.
"""

import json
import os

import numpy as np
import pytest
from PIL import Image

from nar_t2i.cli import main
from nar_t2i.evaluation.comparison import write_comparison
from nar_t2i.evaluation.report import write_report
from tests.evaluation.browser import Browser, missing
from tests.evaluation.test_report import METRICS, quickstart  # noqa: F401  (quickstart: a fixture)


@pytest.fixture(scope="module")
def browser():
    if missing() and os.environ.get("NAR_T2I_REQUIRE_BROWSER") != "1":
        pytest.skip("no chromium on this machine; Debian: apt install chromium")
    with Browser() as opened:
        yield opened


def in_order(page):
    assert page.problems == [] and page.broken == []
    return page


def test_the_report_of_a_quickstart(quickstart, browser):  # noqa: F811
    page = in_order(browser.open(write_report(quickstart)))
    text = (quickstart / "report.html").read_text()
    assert len(page.images) == text.count("<img ") > 8  # curves as SVG, pictures as PNG
    assert page.title.startswith("nar_t2i") and "Scene accuracy" in page.text and "0.812" in page.text


@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_a_phone_and_a_desk(quickstart, browser, width):  # noqa: F811
    assert not browser.open(write_report(quickstart), width).overflows
    assert not browser.open(write_report(quickstart.rename(quickstart.with_name("n" * 80))), width).overflows


def test_the_table_of_several(quickstart, browser, tmp_path):  # noqa: F811
    numbers = {"value": 3.25, "features": "scene", "samples": 40, "real_samples": 40, "protocol": {"about": "x"}}
    for name, count in (("one", 40), ("two", 50)):
        told = {"seed": 0, "data": {"samples": count}, "real": None, "features": {"scene": {"hash": "0"}}}
        content = {
            "kind": "evaluation",
            "protocol": told,
            "results": {"model": {"scene_frechet": numbers, "decoding": {"steps": 8}}},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        (tmp_path / f"{name}.work").mkdir()
        Image.new("RGB", (300, 200), "teal").save(tmp_path / f"{name}.work/sheet-model-captions.png")
    (tmp_path / "suite.json").write_text(json.dumps({"kind": "suite", "suite": "geneval", "scores": {"overall": 0.5}}))
    paths = [str(tmp_path / name) for name in ("one.json", "two.json", "suite.json")]
    assert main(["report", str(quickstart), *paths, "--out", str(tmp_path / "all.html")]) == 0
    page = in_order(browser.open(tmp_path / "all.html"))
    assert (
        len(page.images) == 2 and "geneval: overall" in page.text and "3.25†" in page.text and "Where protocols differ" in page.text
    )


def test_the_comparison_of_an_ablation(browser, tmp_path):
    folders = {}
    for number, name in enumerate(("masked", "halton")):
        folders[name] = [tmp_path / name]
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((40, 60, 3), 90 * number, np.uint8)).save(tmp_path / name / "sheet.png")
        verdicts = {"passed": [True, False, True], "category": ["colors"] * 3}
        (tmp_path / name / "verdicts.json").write_text(
            json.dumps(
                {
                    "seen": verdicts,
                    "held_out": verdicts,
                    "passes": 4 + number,
                    "seconds_an_image": 0.1,
                    "steps": 10,
                    "training_passes": 1.0,
                    "strategy": {"inference": {"class_path": f"a.{name}", "init_args": {}}},
                    "machine": {"cores": 2},
                }
            )
        )
    page = in_order(browser.open(write_comparison(tmp_path, folders)))
    assert len(page.images) == 3 and "halton" in page.text


# ---- controls: what is wrong is seen ---------------------------------------------------------------------------------


def test_control_a_broken_picture_is_seen(quickstart, browser):  # noqa: F811
    path = write_report(quickstart)
    text = path.read_text()
    start = text.index("data:image/png;base64,") + len("data:image/png;base64,")
    path.write_text(text[:start] + "AAAA" + text[start + 400 :])
    assert len(browser.open(path).broken) == 1


@pytest.mark.parametrize("addition, said", [
    ("<script>alert(1)</script>", "Content Security Policy"),
    ('<img src="https://example.invalid/a.png" alt="elsewhere">', "Content Security Policy"),
    ('<img src="beside.png" alt="beside">', "Content Security Policy"),
])  # fmt: skip
def test_control_what_the_page_must_not_do_is_seen(quickstart, browser, addition, said):  # noqa: F811
    path = write_report(quickstart)
    path.write_text(path.read_text().replace("</main>", f"{addition}</main>"))
    page = browser.open(path)
    assert any(said in problem for problem in page.problems), page.problems


def test_control_a_page_of_another_kind_has_errors(browser, tmp_path):
    (tmp_path / "page.html").write_text(
        "<!doctype html><title>x</title><body><script>console.error('no'); undefined.x</script><img src='absent.png' alt='a'>"
    )
    page = browser.open(tmp_path / "page.html")
    assert len(page.problems) >= 3 and page.broken == ["a"]
