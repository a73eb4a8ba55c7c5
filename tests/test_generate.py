"""`nar-t2i generate`: what it writes, where, and what its mistakes print."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence
from safetensors.torch import load_file, save_file

from nar_t2i import generate, pictures
from nar_t2i.cli import main
from nar_t2i.inference import Halton
from nar_t2i.pipeline import TextToImage
from nar_t2i.schedules import Guidance
from tests.full_disk import files_of_at_most
from tests.tiny_pipeline import tiny_pipeline
from tests.toys import ToyCodec

STEPS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(model: Path | str, *arguments: str) -> int:
    return main(["generate", "--model", str(model), "--steps", str(STEPS), "--out", "out", *arguments])


def failure(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line that a mistake prints."""
    assert main(["generate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("nar-t2i: error: ")
    return captured.err


def test_a_runs_folder_is_told_from_a_model(model: Path, capsys: pytest.CaptureFixture) -> None:
    Path("run/checkpoints").mkdir(parents=True)
    assert "run: a run that has not ended; nar-t2i export run MODEL" in failure(capsys, "--model", "run", "--prompt", "a star")
    shutil.copytree(model, "run/model")
    assert "run: a run's folder, whose model is run/model" in failure(capsys, "--model", "run", "--prompt", "a star")


def test_a_recipe_that_is_not_there_is_named_with_its_option(model: Path, capsys: pytest.CaptureFixture) -> None:
    assert "--recipe: recipe 'nope' does not exist" in failure(
        capsys, "--model", str(model), "--prompt", "a star", "--recipe", "nope"
    )


def test_pictures_and_a_contact_sheet(model: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(model, "--prompt", "a red star", "--prompt", "two blue squares", "--seed", "7") == 0
    files = sorted(path.name for path in Path("out").iterdir())
    assert files == ["0007-a-red-star.png", "0008-two-blue-squares.png", "sheet.png"]  # a picture's number is its seed
    expected = TextToImage.from_pretrained(model)(["a red star", "two blue squares"], steps=STEPS, guidance_scale=3.0, seed=7)
    for name, image in zip(files, expected, strict=False):
        assert np.array_equal(np.asarray(Image.open(f"out/{name}")), np.asarray(image))
    sheet = Image.open("out/sheet.png")
    assert sheet.width > 2 * 160 and sheet.height > 160
    # The first picture stands on the sheet, ten times as large, in hard pixels.
    on_sheet = np.asarray(sheet)[8 : 8 + 160 : 10, 8 : 8 + 160 : 10]
    assert np.array_equal(on_sheet, np.asarray(expected[0]))
    assert "2 pictures in out" in capsys.readouterr().out


def test_prompts_from_a_file_follow_those_of_the_command_line(model: Path) -> None:
    Path("prompts.txt").write_text("a star\n\n   two red circles  \nein grünes Quadrat\n", encoding="utf-8")
    assert run(model, "--prompt", "first", "--prompts", "prompts.txt") == 0
    names = sorted(path.stem for path in Path("out").glob("0*.png"))
    assert names == ["0000-first", "0001-a-star", "0002-two-red-circles", "0003-ein-gr-nes-quadrat"]


def test_many_prompts_are_written_as_they_are_drawn(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    prompts = [part for number in range(5) for part in ("--prompt", f"a red star {number}")]
    Image.new("RGB", (16, 16), "red").save("red.png")
    edited = [*prompts, "--image", "red.png", "--variation", "0.5", "--seed", "3", "--film", "strip"]
    assert run(model, *edited) == 0
    whole = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    monkeypatch.setattr(generate, "AT_ONCE", 2)
    shutil.rmtree("out")
    assert run(model, *edited) == 0
    assert whole == {path.name: path.read_bytes() for path in Path("out").iterdir()} and len(whole) == 11
    shutil.rmtree("out")
    sample, calls = TextToImage.sample, []

    def interrupted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr(TextToImage, "sample", interrupted)
    assert run(model, *edited) == 130 and "the same command goes on" in capsys.readouterr().err
    left = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert (
        sorted(left) == [f"000{3 + number}-a-red-star-{number}{film}.png" for number in range(4) for film in (".film", "")]
        and left.items() <= whole.items()
    )
    calls.clear()
    assert run(model, *edited) == 0 and len(calls) == 1 and "5 pictures in out (4 of them drawn before)" in capsys.readouterr().out
    assert whole == {path.name: path.read_bytes() for path in Path("out").iterdir()}


def test_no_picture_is_overwritten(model: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(model, "--prompt", "a red star") == 0
    path, others = Path("out/0000-a-red-star.png"), ["--prompt", "a red star"]
    before = path.read_bytes()
    capsys.readouterr()
    with Image.open(path) as picture:
        told = json.loads(picture.info["nar-t2i"])
    assert (told["prompt"], told["seed"], told["inference"]["init_args"]["steps"]) == ("a red star", 0, STEPS)
    # Another picture of that name: drawn otherwise, the very one that is edited, and one that somebody else has put there.
    for other, words in ((["--temperature", "9"], "inference"), (["--negative-prompt", "green"], "negative prompt"),
                         (["--image", str(path), "--variation", "0.5"], "image")):  # fmt: skip
        assert words in failure(capsys, "--model", str(model), "--out", "out", "--steps", str(STEPS), *others, *other)
        assert path.read_bytes() == before
    Image.new("RGB", (4, 4)).save(path)
    assert "was not drawn by this command" in failure(capsys, "--model", str(model), "--out", "out", *others)
    path.write_bytes(before[:-200])
    assert "0000-a-red-star.png is there, and was not drawn by this command, or is not whole" in failure(
        capsys, "--model", str(model), "--out", "out", *others
    )
    path.write_bytes(before)
    assert run(model, *others, "--seed", "1") == 0 and path.read_bytes() == before  # beside it
    capsys.readouterr()
    # A model that was trained on, in the same folder, is another one.
    shutil.copytree(model, "trained")
    weights = load_file("trained/network/weights.safetensors")
    save_file({name: value + 1e-3 for name, value in weights.items()}, "trained/network/weights.safetensors")
    assert "another model" in failure(capsys, "--model", "trained", "--out", "out", "--steps", str(STEPS), *others)


def test_prompts_of_json_lines(model: Path, capsys: pytest.CaptureFixture) -> None:
    Path("scenes.jsonl").write_text('\ufeff{"prompt": "a red \u2028circle", "category": "colors"}\n', encoding="utf-8")
    assert run(model, "--prompts", "scenes.jsonl") == 0 and Path("out/0000-a-red-circle.png").is_file()
    capsys.readouterr()
    for line, words in (
        ('{"caption": "a"}', "is no object with a prompt"),
        ('{"prompt": null}', "is no object with a prompt"),
        ('{"prompt": "a star"}\n\n{"prompt": " "}', 'line 3: \'{"prompt": " "}\' is no object with a prompt'),
        ("a star", "line 1: 'a star' is not JSON"),
    ):
        Path("other.jsonl").write_text(line)
        assert words in failure(capsys, "--model", str(model), "--prompts", "other.jsonl")


def test_a_picture_in_the_models_folder_does_not_make_it_another(model: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(model, "model")
    for _ in range(2):
        assert main(["generate", "--model", "model", "--out", "model/samples", "--prompt", "a\udcff star", "--film", "strip"]) == 0
    assert "1 pictures in model/samples (1 of them drawn before)" in capsys.readouterr().out
    # Drawn anew without a film, it has none that shows another.
    Path("model/samples/0000-a-star.png").unlink()
    assert main(["generate", "--model", "model", "--out", "model/samples", "--prompt", "a\udcff star", "--steps", "2"]) == 0
    assert sorted(path.name for path in Path("model/samples").iterdir()) == ["0000-a-star.png", "sheet.png"]


def test_a_strip_shows_every_step_until_nothing_is_unknown(model: Path) -> None:
    assert run(model, "--prompt", "a red star", "--prompt", "two", "--film", "strip") == 0
    strips = sorted(Path("out").glob("*.film.png"))
    assert [path.name for path in strips] == ["0000-a-red-star.film.png", "0001-two.film.png"]
    strip = np.asarray(Image.open(strips[0]))
    assert strip.shape == (16, STEPS * 18, 3)
    frames = [strip[:, 18 * step : 18 * step + 16] for step in range(STEPS)]
    # Patches of the 4 × 4 grid that are wholly grey: unknown tokens, fewer each step.
    unknown = [
        sum(bool((frame[y : y + 4, x : x + 4] == pictures.UNKNOWN_GREY).all()) for y in range(0, 16, 4)
            for x in range(0, 16, 4))
        for frame in frames
    ]  # fmt: skip
    assert unknown[0] < 16 and unknown == sorted(unknown, reverse=True) and len(set(unknown)) == STEPS
    assert unknown[-1] == 0
    assert np.array_equal(frames[-1], np.asarray(Image.open("out/0000-a-red-star.png")))


def test_an_animated_picture_has_a_frame_a_step_and_a_hold(model: Path) -> None:
    assert run(model, "--prompt", "a red star", "--film", "gif") == 0
    (path,) = Path("out").glob("*.film.gif")
    with Image.open(path) as film:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(film)]
        assert film.size == (64, 64) and film.info["loop"] == 0
    # The hold is the last frame again; writers of GIFs join equal frames into a longer one.
    assert len(durations) >= STEPS and set(durations[: STEPS - 1]) == {pictures.FRAME_MILLISECONDS}
    assert sum(durations) == pictures.FRAME_MILLISECONDS * (STEPS + 6)


def test_films_need_a_grid() -> None:
    with pytest.raises(Exception, match="no grid"):
        pictures.Films(ToyCodec("continuous"))


def test_temperature_negative_prompt_and_guidance_reach_the_pipeline(model: Path) -> None:
    def picture(*arguments: str) -> bytes:
        shutil.rmtree("out", ignore_errors=True)
        assert run(model, "--prompt", "a red star", *arguments) == 0
        (path,) = Path("out").glob("*-a-red-star.png")
        return np.asarray(Image.open(path)).tobytes()

    plain = picture()
    assert picture() == plain
    for other in (["--temperature", "9"], ["--negative-prompt", "green"], ["--guidance-scale", "1"], ["--seed", "1"]):
        assert picture(*other) != plain, other


def test_a_prompt_that_is_cut_off_and_a_seed_that_is_too_long_are_told(model: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(model, "--prompt", "a red star and " * 20) == 0
    assert "1 of the texts are longer than this model reads" in capsys.readouterr().err
    assert run(model, "--prompt", "a red star") == 0 and "longer" not in capsys.readouterr().err
    assert run(model, "--prompt", "a red star", "--seed", str(2**63)) == 2
    assert "seed 9223372036854775808 is no whole number of 64 bits" in capsys.readouterr().err


def test_a_recipe_says_how_to_decode(model: Path, capsys: pytest.CaptureFixture) -> None:
    def picture(*arguments: str) -> bytes:
        shutil.rmtree("out", ignore_errors=True)
        assert main(["generate", "--model", str(model), "--out", "out", "--prompt", "a red star", *arguments]) == 0
        return np.asarray(Image.open("out/0000-a-red-star.png")).tobytes()

    t2i = TextToImage.from_pretrained(model)
    t2i.inference, t2i.guidance = Halton(4, temperature=0.5), Guidance(1.5)
    expected = np.asarray(t2i("a red star")[0]).tobytes()
    Path("own.yaml").write_text(
        "model: {init_args: {inference: {class_path: nar_t2i.inference.Halton, init_args: {steps: 4, temperature: 0.5}}, "
        "guidance: {scale: 1.5}}}\n"
    )
    assert picture("--recipe", "own.yaml") == expected
    assert picture("--recipe", "inference/halton", "--steps", "4") != expected
    capsys.readouterr()
    for recipe, words in (
        ("scale/small", "says no way to decode"),
        ("inference/none", "does not exist"),
        ("inference/critic_guided", "critic/model"),
        ("learning/autoregressive", "not Autoregressive"),
    ):
        assert words in failure(capsys, "--model", str(model), "--prompt", "a star", "--recipe", recipe)


@pytest.mark.parametrize(("inference", "guidance", "words"), [
    ("Confidence, init_args: {stepz: 4}", "", "unexpected keyword argument 'stepz'"),
    ("CriticGuided", "", "missing a required argument: 'critic'"), ("Confidence, init_args: 4", "", "cannot be built"),
    ("Confidence, init_args: {schedule: wavy}", "", "schedule 'wavy' is none of cosine"), ("Nothing", "", "does not exist"),
    ("Likelihood", "", "must name a strategy"), ("Halton", ", guidance: {scal: 2}", "unexpected keyword argument 'scal'"),
])  # fmt: skip
def test_a_recipe_that_cannot_be_drawn_by_is_one_line(
    model: Path, capsys: pytest.CaptureFixture, inference: str, guidance: str, words: str
) -> None:
    Path("own.yaml").write_text(f"model: {{init_args: {{inference: {{class_path: nar_t2i.inference.{inference}}}{guidance}}}}}")
    assert words in failure(capsys, "--model", str(model), "--prompt", "a star", "--recipe", "own.yaml")


@pytest.mark.parametrize("prompt", [
    "../../escape", "/etc/passwd", "..", ".", "", "a\x00b", "CON", "x" * 500, "日本語", "a/b\\c:d*e?f", "a\nb", "\t",
])  # fmt: skip
def test_a_prompt_never_becomes_a_path(model: Path, folder: Path, prompt: str) -> None:
    assert run(model, "--prompt", prompt) == 0
    (name,) = (path.name for path in (folder / "out").iterdir() if path.name != "sheet.png")
    assert re.fullmatch(r"0000-[a-z0-9-]{1,48}\.png", name)
    assert sorted(path.name for path in folder.iterdir()) == ["out"]


def test_sheets_break_into_rows() -> None:
    shown = [Image.new("RGB", (16, 16), "blue")] * 11
    eight, three = pictures.contact_sheet(shown, ["a caption"] * 11), pictures.contact_sheet(shown[:3], [""] * 3)
    assert eight.width == 8 * 168 + 8 and eight.height == 2 * three.height - 8
    assert three.width == 3 * 168 + 8


@pytest.mark.parametrize("arguments, words", [
    ([], "--prompt"),
    (["--prompts", "absent.txt"], "absent.txt"),
    (["--prompts", "empty.txt"], "empty.txt: holds no prompt"),
    (["--prompts", "latin.txt"], "latin.txt"),
    (["--prompts", "."], "--prompts"),
    (["--prompt", "a", "--steps", "many"], "--steps"),
    (["--prompt", "a", "--film", "tape"], "--film"),
    (["--prompt", "a", "--colour", "red"], "--colour"),
])  # fmt: skip
def test_a_mistake_prints_one_line(
    model: Path, folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], words: str
) -> None:
    (folder / "empty.txt").write_text("\n  \n")
    (folder / "latin.txt").write_bytes("grün".encode("latin-1"))
    assert words in failure(capsys, "--model", str(model), *arguments)
    assert not (folder / "generated").exists()


@pytest.mark.parametrize("film", ["strip", "gif"])
def test_a_full_disk_is_one_line_and_leaves_no_half_picture(model: Path, capsys: pytest.CaptureFixture, film: str) -> None:
    for most in (20, 2_000):
        with files_of_at_most(most):
            told = failure(capsys, "--model", str(model), "--out", f"out-{most}", "--prompt", "a star", "--film", film)
        assert f"--out out-{most}: File too large" in told
    written = [path for path in Path().rglob("*") if path.is_file()]
    assert {path.name for path in written} <= {"0000-a-star.png", "0000-a-star.film.png", "sheet.png"} and written
    for path in written:
        Image.open(path).load()


def test_an_unknown_or_unfit_model_folder_is_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert "absent" in failure(capsys, "--model", "absent", "--prompt", "a star")
    (folder / "other").mkdir()
    (folder / "other/config.json").write_text('{"class_path": "x", "init_args": {}}')
    assert "other" in failure(capsys, "--model", "other", "--prompt", "a star")
