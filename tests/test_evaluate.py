"""`nar-t2i evaluate`: what it draws and tells, that it goes on, and what it refuses. Several ranks:
tests/cluster/test_evaluate.py.
"""

import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nar_t2i.cli import main
from nar_t2i.errors import UserError
from nar_t2i.evaluation.chosen import Chosen, open_data
from nar_t2i.evaluation.features import ClipFeatures, InceptionFeatures, SceneFeatures
from nar_t2i.evaluation.metrics import Fid, SceneFrechet
from nar_t2i.evaluation.metrics.metric import Compared
from nar_t2i.evaluation.scene_accuracy import score
from nar_t2i.evaluation.scene_prompts import committed, take
from nar_t2i.generate import shipped_model
from nar_t2i.pipeline import TextToImage
from tests.cluster.ranks import ROOT
from tests.data.making_shards import write_shards
from tests.evaluation.test_features import Means, clip, saved  # noqa: F401  (clip: a fixture)
from tests.full_disk import files_of_at_most
from tests.tiny_pipeline import tiny_pipeline

CPU = torch.device("cpu")
SEVERAL = "fid,kid,precision_recall,scene_frechet"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder, shards of 23 pictures with two captions each, a file that stands where Inception's would."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_pipeline(folder).save_pretrained(folder / "model")
    write_shards(folder / "shards", [10, 13], captions=2)
    saved(Means(), folder / "inception.pt")
    return folder


def evaluate(place, out, *options, model="model", status=0):
    line = ["evaluate", str(place / model), "--out", str(out), *options]
    assert main([word.replace("@", f"{place}/") for word in line]) == status
    return json.loads(out.read_text()) if status == 0 else None


def numbers(content, kind="model"):
    """All numbers of results, without what decoding and protocols say."""
    results = content["results"][kind]
    return {f"{m}/{k}": v for m, r in results.items() if m != "decoding" for k, v in r.items() if isinstance(v, float)}


def test_the_numbers_are_those_of_the_pictures_and_their_protocol_is_told(place, tmp_path):
    found = evaluate(place, tmp_path / "out.json", "--metrics", SEVERAL, "--data", "@shards", "--inception", "@inception.pt",
                     "--seed", "7", "--steps", "2", "--batch-size", "8")  # fmt: skip
    t2i = TextToImage.from_pretrained(place / "model")
    captions = [f"caption {n}.0" for n in range(23)]
    drawn = t2i.sample(captions, steps=2, seed=7).images  # picture i of seed 7 + i, in one batch
    real = Chosen(open_data(str(place / "shards"), None, 16), None).images(range(23), 16)
    for metric, features in ((Fid(), InceptionFeatures(place / "inception.pt", CPU)), (SceneFrechet(), SceneFeatures(CPU))):
        expected = metric.numbers(Compared(features.of_images(drawn), features.of_images(real)))["value"]
        assert found["results"]["model"][metric.name]["value"] == pytest.approx(expected, rel=1e-4)
        assert expected > 0
    result, told = found["results"]["model"], found["protocol"]
    assert result["fid"]["samples"] == result["fid"]["real_samples"] == 23
    assert result["decoding"] == {**result["decoding"], "steps": 2, "seed": 7, "decoder_passes": 2, "guidance_scale": 3.0}
    assert told["features"]["inception"]["file"] == "inception.pt" and len(told["features"]["inception"]["sha256"]) == 64
    assert (
        told["data"]["samples"] == 23 and "Lanczos" in told["real"]["resize"] and told["seed"] == 7 and told["real"]["pixels"] == 16
    )
    assert "NOT FID" in result["scene_frechet"]["protocol"]["about"]
    assert (tmp_path / "out.work/sheet-model-captions.png").is_file() and found["kind"] == "evaluation"


def test_batch_sizes_do_not_matter(place, tmp_path):
    line = ("--metrics", SEVERAL, "--data", "@shards", "--inception", "@inception.pt")
    one, other = (numbers(evaluate(place, tmp_path / f"{n}.json", *line, "--batch-size", n)) for n in ("5", "64"))
    assert one == pytest.approx(other, rel=1e-4) and len(one) == 5 and all(map(math.isfinite, one.values()))
    another = numbers(evaluate(place, tmp_path / "seed.json", *line, "--seed", "1"))
    assert another["fid/value"] != pytest.approx(one["fid/value"], rel=1e-4)  # the comparison can fail


def test_a_precision_is_what_pictures_are_drawn_in(place, tmp_path, capsys):
    line = ("--metrics", "scene_frechet", "--data", "@shards", "--batch-size", "8")
    plain, half = (evaluate(place, tmp_path / f"{p}.json", *line, *option)
                   for p, option in (("plain", ()), ("half", ("--precision", "bf16-mixed"))))  # fmt: skip
    assert [found["results"]["model"]["decoding"]["precision"] for found in (plain, half)] == ["fp32", "bf16"]
    t2i, features = TextToImage.from_pretrained(place / "model"), SceneFeatures(CPU)
    with torch.autocast("cpu", torch.bfloat16):
        drawn = t2i.sample([f"caption {n}.0" for n in range(8)], seed=0).images
    expected = features.of_images(drawn)  # outside of autocast
    kept = load_file(tmp_path / "half.work/model-captions/00000000.safetensors")["scene"]
    torch.testing.assert_close(kept, expected)
    assert not torch.allclose(features.of_images(t2i.sample([f"caption {n}.0" for n in range(8)], seed=0).images), expected)
    evaluate(place, tmp_path / "half.json", *line, status=2)
    assert "precision 'bf16-mixed', and now it is '32-true'" in capsys.readouterr().err
    evaluate(place, tmp_path / "none.json", *line, "--precision", "16-true", status=2)
    assert "invalid choice: '16-true'" in capsys.readouterr().err


def test_the_same_command_goes_on_with_what_is_there(place, tmp_path, capsys):
    line = ("--metrics", "scene_frechet", "--data", "@shards", "--batch-size", "4")
    whole = evaluate(place, tmp_path / "out.json", *line)
    pieces = sorted((tmp_path / "out.work/model-captions").iterdir())
    assert len(pieces) == 6
    pieces[2].unlink()
    (tmp_path / "out.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert numbers(evaluate(place, tmp_path / "out.json", *line)) == numbers(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()) and pieces[2].is_file()
    capsys.readouterr()
    for other in (("--seed", "1"), ("--steps", "3"), ("--count", "20")):
        evaluate(place, tmp_path / "out.json", *line, *other, status=2)
        assert "out.work was made with" in capsys.readouterr().err
    pieces[3].write_bytes(b"half")
    evaluate(place, tmp_path / "out.json", *line, status=2)
    assert f"{pieces[3].name}: cannot be read" in capsys.readouterr().err
    pieces[3].unlink()
    assert numbers(evaluate(place, tmp_path / "out.json", *line)) == numbers(whole)


def test_clip_score_and_cmmd_of_a_local_clip(place, clip, tmp_path):  # noqa: F811
    found = evaluate(place, tmp_path / "out.json", "--metrics", "clip_score,cmmd", "--data", "@shards", "--clip", str(clip))
    result = found["results"]["model"]
    assert 0 <= result["clip_score"]["value"] <= 100 and result["cmmd"]["value"] > 0
    assert "model.safetensors" in found["protocol"]["features"]["clip"]["sha256"]


def test_scene_accuracy_is_the_librarys(tmp_path):
    """On the small model of the package; two prompts a category, one of each kind of prompts."""
    line = ["--per-category", "1", "--candidates", "1", "--steps", "4"]
    assert main(["evaluate", str(shipped_model()), *line, "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["results"]["model"]
    prompts = take(committed("seen"), 1)
    t2i = TextToImage.from_pretrained(shipped_model())
    images = t2i.sample([p.prompt for p in prompts], steps=4, candidates=1).images
    assert found["scene_accuracy"]["seen"] == json.loads(json.dumps(score(images.permute(0, 2, 3, 1).numpy(), prompts)))
    assert set(found["scene_accuracy"]) == {"seen", "held_out", "shuffled"}
    assert found["decoding"]["decoder_passes"] == 4 and found["decoding"]["truncated_prompts"] == 0


@pytest.fixture(scope="module")
def run(place):
    """A run of four steps, with averaged weights."""
    recipe = yaml.safe_load((ROOT / "tests/cluster/tiny.yaml").read_text())
    recipe["run_dir"] = str(place / "run")
    recipe["model"]["init_args"].update(
        tokenizer=str(place / "model/tokenizer"),
        text={
            "class_path": "nar_t2i.text.scratch.ScratchTextEncoder",
            "init_args": {"vocabulary": str(place / "tiny.model"), "width": 16, "depth": 1, "heads": 2},
        },
    )
    recipe["model"]["init_args"]["optimizer"]["learning_rate"] = 0.1  # so that averaged weights draw otherwise than raw ones
    recipe["trainer"].update(max_steps=4, num_sanity_val_steps=0)
    recipe["checkpoint"] = {"every_steps": 2, "keep": 2}
    (place / "run.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(place / "run.yaml")]) == 0
    return place / "run"


def test_a_run_is_evaluated_with_averaged_and_raw_weights(place, run, tmp_path, capsys):
    line = ("--metrics", "scene_frechet", "--data", "@run/config.yaml", "--batch-size", "4")  # its validation data
    both = evaluate(place, tmp_path / "both.json", *line, "--weights", "both", model="run")
    assert set(both["results"]) == {"ema", "raw"} and both["model"]["ema"]["step"] == 4
    assert both["protocol"]["data"]["source"].startswith("rendered scenes (validation")
    for name, raw in (("ema", []), ("raw", ["--raw"])):
        assert main(["export", str(run), str(tmp_path / name), *raw]) == 0
        line = ["--metrics", "scene_frechet", "--data", str(run / "config.yaml"), "--batch-size", "4"]
        assert main(["evaluate", str(tmp_path / name), *line, "--out", str(tmp_path / f"{name}.json")]) == 0
        alone = json.loads((tmp_path / f"{name}.json").read_text())
        assert numbers(alone) == numbers(both, name)
    assert numbers(both, "ema") != numbers(both, "raw")
    capsys.readouterr()
    line = ("--metrics", "scene_frechet", "--data", "@run/config.yaml", "--batch-size", "4")
    evaluate(place, tmp_path / "both.json", *line, "--weights", "raw", model="run", status=2)
    assert "both.json: holds numbers of the ema weights, which would be lost" in capsys.readouterr().err
    assert json.loads((tmp_path / "both.json").read_text()) == both
    first = evaluate(place, tmp_path / "first.json", *line, model="run/checkpoints/step-00000002.ckpt")
    assert list(first["results"]) == ["ema"] and first["model"]["ema"]["step"] == 2
    capsys.readouterr()
    evaluate(place, tmp_path / "no.json", "--weights", "ema", status=2)
    assert "is a model folder, which holds one kind" in capsys.readouterr().err


def test_a_run_whose_tokenizer_was_exchanged_is_no_model(place, run, tmp_path, capsys):
    """Of the same shapes, so that nothing else would tell."""
    weights = place / "model/tokenizer/weights.safetensors"
    before = weights.read_bytes()
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    try:
        assert main(["export", str(run), str(tmp_path / "exported")]) == 2
        assert "model.init_args.tokenizer: the checkpoint is of another tokenizer" in capsys.readouterr().err
        evaluate(place, tmp_path / "out.json", "--metrics", "scene_frechet", "--data", "@run/config.yaml", model="run", status=2)
        assert not list(tmp_path.iterdir())
    finally:
        weights.write_bytes(before)


def test_a_tokenizer_s_run_is_named_and_leaves_nothing(place, tmp_path, capsys):
    recipe = yaml.safe_load((ROOT / "tests/cluster/tiny_tokenizer.yaml").read_text())
    recipe |= {"run_dir": str(tmp_path / "run"), "checkpoint": {"every_steps": 1}}
    recipe["trainer"]["max_steps"] = 1
    (tmp_path / "tokenizer.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(tmp_path / "tokenizer.yaml")]) == 0
    capsys.readouterr()
    line = ["--metrics", "scene_frechet", "--data", "scenes", "--count", "4", "--out", str(tmp_path / "out.json")]
    assert main(["evaluate", str(tmp_path / "run"), *line]) == 2
    assert f"{tmp_path}/run: trains a part alone, which draws no pictures" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_checkpoint_that_is_cut_off_is_named(place, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step-00000002.ckpt"
    with open(checkpoint / "run.pt", "r+b") as file:
        file.truncate(100)
    capsys.readouterr()
    assert (
        main(
            [
                "evaluate",
                str(checkpoint),
                "--metrics",
                "scene_frechet",
                "--data",
                "scenes",
                "--count",
                "4",
                "--out",
                str(tmp_path / "no.json"),
            ]
        )
        == 2
    )
    assert f"{checkpoint}: is no whole checkpoint: " in capsys.readouterr().err


def test_a_run_without_averaged_weights_says_so(place, run, tmp_path, capsys):
    recipe = yaml.safe_load((place / "run.yaml").read_text())
    recipe["run_dir"], recipe["model"]["init_args"]["ema_decay"] = str(tmp_path / "plain"), None
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(tmp_path / "plain.yaml")]) == 0
    line = [
        "evaluate",
        str(tmp_path / "plain"),
        "--metrics",
        "scene_frechet",
        "--data",
        "scenes",
        "--count",
        "4",
        "--out",
        str(tmp_path / "out.json"),
    ]
    capsys.readouterr()
    assert main(line) == 2
    assert "holds no averaged weights" in capsys.readouterr().err
    assert main([*line, "--weights", "raw"]) == 0


def test_more_metrics_of_the_same_features_need_no_drawing(place, clip, tmp_path, monkeypatch):  # noqa: F811
    line = ("--data", "@shards", "--clip", str(clip))
    for before, after in (
        ("clip_score", "clip_score,cmmd"),
        ("cmmd", "cmmd,clip_score"),
        ("clip_score,scene_frechet", "cmmd,scene_frechet"),
    ):
        out = tmp_path / before / "out.json"
        out.parent.mkdir()
        evaluate(place, out, "--metrics", before, *line)
        fresh = evaluate(place, out.with_name("fresh.json"), "--metrics", after, *line)
        with monkeypatch.context() as patch:
            patch.setattr(TextToImage, "sample", None)
            assert numbers(evaluate(place, out, "--metrics", after, *line)) == numbers(fresh)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--metrics", "fid", "--data", "@shards"], "fid needs --inception FILE; nothing stands in for its weights"),
        (["--metrics", "cmmd", "--data", "@shards"], "cmmd needs --clip FOLDER"),
        (["--metrics", "scene_frechet"], "scene_frechet needs --data"),
        (["--metrics", "fiddle"], "'fiddle' is no metric; there are scene_accuracy, fid, kid"),
        (["--data", "@shards"], "--data: none of the metrics uses it"),
        (["--count", "3"], "--count: none of the metrics uses it"),
        (["--clip", "nowhere"], "--clip: none of the metrics uses it"),
        (
            ["--metrics", "scene_frechet", "--data", "@shards", "--inception", "@inception.pt"],
            "--inception: none of the metrics uses it",
        ),
        (["--metrics", "scene_frechet", "--data", "@shards", "--per-category", "2"], "are for scene_accuracy"),
        (["--metrics", "scene_frechet", "--data", "@shards", "--count", "24"], "holds 23 samples, and 24 are asked for"),
        (["--metrics", "scene_frechet", "--data", "@nowhere"], "shards do not exist"),
        (["--metrics", "scene_frechet", "--data", "scenes"], "say with --count how many"),
        (
            ["--metrics", "scene_frechet", "--data", "quickstart/tokenizer.yaml", "--batch-size", "0"],
            "--batch-size must be at least 1",
        ),
        (
            ["--metrics", "precision_recall", "--data", "@shards", "--inception", "@inception.pt", "--count", "3"],
            "3 neighbours need more",
        ),
        (["--metrics", "scene_frechet", "--data", "scenes", "--count", "-3"], "--count must be at least 1, not -3"),
        (["--protocol", "coco-30k", "--count", "9"], "--count: is fixed by the protocol coco-30k"),
        (["--protocol", "coco-30k", "--data", "@shards", "--clip", "@model"], "fid needs --inception FILE"),
        (["--prompts", "@shuffled.jsonl"], "shuffled is what the control is called"),
        (["--protocol", "coco"], "--protocol coco: no such file, and none of the shipped ones: coco-30k"),
        ([], "scene_accuracy: the detector needs 48 px a side, and the model draws 16"),
    ],
)
def test_what_is_refused_is_said_in_a_line(place, tmp_path, capsys, options, said):
    evaluate(place, tmp_path / "out.json", *options, status=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error and error.startswith("nar-t2i: error: ")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("protocol, said", [
    ({"metrics": {"kid": {"subsets": 2}}}, "kid: subset_size 1000 must be between 2 and the 23 samples"),
    ({"metrics": {"precision_recall": {"neighbours": 23}}}, "23 neighbours need more than the 23 samples"),
    ({"metrics": {"fid": {}}, "count": 1}, "fid needs at least 2 samples"),
    ({"metrics": ["scene_accuracy"], "caption": "random"}, "key caption: none of the metrics uses it"),
    ({"metrics": ["scene_accuracy"], "count": 6}, "key count: none of the metrics uses it"),
    ({"metrics": {"scene_frechet": {}}, "inception": {"input": "unit"}}, "key inception: none of the metrics uses it"),
    ({"metrics": {"fid": {}}, "choice_seed": 2**64 - 1}, "key choice_seed: must be a whole number"),
])  # fmt: skip
def test_a_protocol_that_cannot_be_is_refused_before_anything_is_drawn(place, tmp_path, capsys, monkeypatch, protocol, said):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(protocol))
    monkeypatch.setattr(TextToImage, "sample", None)
    options = ["--data", "@shards"] * ("scene_accuracy" not in protocol["metrics"]) + ["--inception", "@inception.pt"] * bool(
        {"fid", "kid", "precision_recall"} & set(protocol["metrics"])
    )
    evaluate(place, tmp_path / "out.json", "--protocol", str(tmp_path / "own.yaml"), *options, status=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error and error.startswith("nar-t2i: error: ")


def test_pictures_of_a_model_folder_are_not_scored_as_those_of_other_settings(place, clip, tmp_path, capsys):  # noqa: F811
    """By metrics that compare with no real pictures, so that what is drawn is all there is."""
    line = ("--metrics", "clip_score", "--data", "@shards", "--clip", str(clip), "--count", "8", "--steps", "2")
    evaluate(place, tmp_path / "out.json", *line)
    (tmp_path / "out.json").unlink()
    for other in (("--seed", "3"), ("--steps", "1"), ("--count", "9")):
        evaluate(place, tmp_path / "out.json", *line, *other, status=2)
        assert "out.work was made with" in capsys.readouterr().err
    assert evaluate(place, tmp_path / "out.json", *line)["results"]["model"]["decoding"]["steps"] == 2


def test_what_was_drawn_before_an_error_stays(place, clip, tmp_path, monkeypatch, capsys):  # noqa: F811
    line = ("--metrics", "clip_score", "--data", "@shards", "--clip", str(clip), "--batch-size", "8")
    of_texts, calls = ClipFeatures.of_texts, []

    def full(self, texts):
        calls.append(texts)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", "somewhere")
        return of_texts(self, texts)

    monkeypatch.setattr(ClipFeatures, "of_texts", full)
    evaluate(place, tmp_path / "out.json", *line, status=2)
    assert "the same command goes on" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out.work/model-captions").iterdir()] == ["00000000.safetensors"]
    evaluate(place, tmp_path / "out.json", *line)
    assert len(calls) == 4  # the first batch is not drawn again


@pytest.mark.parametrize("content", ["a: b\n", '{"kind": "suite"}', '{"prompt": "x"}\n{"prompt": "y"}\n'])
def test_another_file_is_not_written_over(place, tmp_path, capsys, content):
    (tmp_path / "out.json").write_text(content)
    evaluate(place, tmp_path / "out.json", "--metrics", "scene_frechet", "--data", "@shards", status=2)
    assert "out.json: is a file of something else, and would be lost" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == content and len(list(tmp_path.iterdir())) == 1


def test_numbers_of_another_evaluation_are_not_written_over(place, tmp_path, capsys):
    line = ("--metrics", "scene_frechet", "--data", "@shards", "--count", "4")
    evaluate(place, tmp_path / "out.json", *line)
    before = (tmp_path / "out.json").read_text()
    shutil.rmtree(tmp_path / "out.work")
    evaluate(place, tmp_path / "out.json", *line, "--seed", "1", status=2)
    assert "out.json: holds an evaluation of something else" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == before
    evaluate(place, tmp_path / "out.json", *line)


def test_an_evaluation_and_a_suite_do_not_share_a_folder(place, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    draw = ["suite", "draw", "t2i-compbench", str(place / "model"), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "1",
            "--pictures", "1"]  # fmt: skip
    score = ("--metrics", "scene_frechet", "--data", "@shards", "--count", "4")
    assert main([*draw, "--out", str(tmp_path / "one")]) == 0
    evaluate(place, tmp_path / "one.json", *score, status=2)
    assert "one.work/settings.json is of a suite's pictures" in capsys.readouterr().err
    evaluate(place, tmp_path / "two.json", *score)
    assert main([*draw, "--out", str(tmp_path / "two")]) == 2
    assert "two.work/settings.json is of an evaluation" in capsys.readouterr().err
    assert main([*draw, "--out", str(tmp_path / "one")]) == 0


@pytest.mark.parametrize("line", [
    ["evaluate", "m"], ["suite", "ingest", "geneval", "x"], ["suite", "draw", "geneval", "m", "--prompts", "x"], ["report", "x"]
])  # fmt: skip
def test_folders_in_the_place_of_files_are_named(tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text('{"tag": "counting", "prompt": "p", "correct": true, "kind": "suite", "scores": {}}\n')
    assert main([*line, "--out", "."]) == 2
    assert "error: --out .: " in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_every_file_has_pieces_of_its_own(place, tmp_path):
    line = ("--metrics", "scene_frechet", "--data", "@shards", "--count", "4")
    for name, steps in (("m-1.5", "1"), ("m-1.6", "2"), ("x.work", "1")):
        evaluate(place, tmp_path / name, *line, "--steps", steps)
        assert (tmp_path / f"{name}.work").is_dir() and (tmp_path / name).is_file()


def test_a_mistake_before_anything_was_drawn_is_mended_by_the_next_command(place, tmp_path, capsys):
    line = ("--metrics", "scene_frechet", "--data", "@shards")
    evaluate(place, tmp_path / "out.json", *line, "--steps", "0", status=2)
    assert "steps must be at least 1" in capsys.readouterr().err
    assert evaluate(place, tmp_path / "out.json", *line, "--steps", "2")["results"]["model"]["decoding"]["steps"] == 2


def test_where_the_numbers_cannot_go_is_said_before_anything_is_drawn(place, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for out, said in (("folder", "folder: is a folder; name a file"), ("file/out.json", "Not a directory")):
        evaluate(place, tmp_path / out, status=2)
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "folder.work").exists()


def test_a_disk_that_fills_up_is_one_line_and_the_command_goes_on(place, tmp_path, capsys):
    line = ("--metrics", "scene_frechet", "--data", "@shards", "--batch-size", "8")
    evaluate(place, tmp_path / "whole.json", *line)
    with files_of_at_most(1000):
        evaluate(place, tmp_path / "out.json", *line, status=2)
    assert "File too large; the same command goes on" in capsys.readouterr().err
    assert numbers(evaluate(place, tmp_path / "out.json", *line)) == numbers(json.loads((tmp_path / "whole.json").read_text()))


def test_a_sample_that_cannot_be_read_is_not_left_out(place, tmp_path, capsys):
    from tests.data.making_shards import hurt_members, write_tar

    write_tar(tmp_path / "hurt/00000.tar", hurt_members())
    evaluate(place, tmp_path / "out.json", "--metrics", "scene_frechet", "--data", str(tmp_path / "hurt"), status=2)
    assert "an evaluation leaves no sample out" in capsys.readouterr().err


def test_what_a_source_lost_is_not_left_out_either(place, tmp_path, capsys):
    write_shards(tmp_path / "shards", [4])
    shard = tmp_path / "shards/00000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    shard.with_name("00000.index.safetensors").unlink()  # as another program's shards come
    evaluate(place, tmp_path / "out.json", "--metrics", "scene_frechet", "--data", str(tmp_path / "shards"), status=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        "samples cannot be used, such as " in error and "cut off by the end of the tar" in error and "leaves no sample out" in error
    )


def test_what_was_chosen_in_another_order_or_of_other_data_is_told_apart(place, tmp_path):
    def told(folder, count=None):
        return Chosen(open_data(str(folder), None, 16), count).identity()

    assert told(place / "shards") == told(place / "shards") != told(place / "shards", 23)  # all, in two orders
    shutil.copytree(place / "shards", tmp_path / "copy")
    write_shards(tmp_path / "other", [10, 13])
    own, copied, other = (told(folder)["hash"] for folder in (place / "shards", tmp_path / "copy", tmp_path / "other"))
    assert own == copied != other


def test_validation_data_of_a_mixture_come_with_their_pictures(place, tmp_path):
    parts = [{"source": str(place / "shards"), "cache": "nowhere", "text_cache": "nowhere either"}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"validation": parts}}}))
    assert Chosen(open_data(str(tmp_path / "config.yaml"), None, 16), 3).images(range(3), 16).shape == (3, 3, 16, 16)


def test_a_recipe_whose_validation_data_are_not_there_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"validation": "nowhere/shards"}}}))
    with pytest.raises(UserError, match="config.yaml: key data.init_args.validation: .*nowhere/shards"):
        open_data(str(tmp_path / "config.yaml"), None, 16)


def test_what_is_no_model_is_named(place, tmp_path, capsys):
    evaluate(place, tmp_path / "out.json", model="nothing", status=2)
    assert "nothing is neither a whole checkpoint nor a run that has one" in capsys.readouterr().err
    evaluate(place, tmp_path / "out.json", model="model/tokenizer", status=2)
    assert "model/tokenizer: a VQGAN alone, which draws no pictures" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # nor a folder of what could not begin
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work/mine.txt").write_text("kept")
    evaluate(place, tmp_path / "out.json", model="model/tokenizer", status=2)
    assert (tmp_path / "out.work/mine.txt").read_text() == "kept"  # a folder that was there before stays


def test_a_protocol_fixes_what_is_drawn(place, tmp_path):
    shutil.copyfile(ROOT / "recipes/evaluation/coco-30k.yaml", tmp_path / "coco.yaml")
    (tmp_path / "small.yaml").write_text(
        "extends: coco.yaml\ncount: 9\nmetrics: [fid, kid]\ninception: {input: unit, resize: 12}\n"
    )
    line = ("--protocol", str(tmp_path / "small.yaml"), "--data", "@shards", "--inception", "@inception.pt")
    found = evaluate(place, tmp_path / "out.json", *line)
    told, result = found["protocol"], found["results"]["model"]
    assert told["name"] == "small" and told["data"]["caption"] == "random" and told["real"]["which"] == "all"
    assert result["fid"]["samples"] == 9 and result["fid"]["real_samples"] == 23
    assert told["features"]["inception"]["input"] == "unit" and "12 px" in told["features"]["inception"]["resize"]


@pytest.mark.parametrize("text, said", [
    ("metrics: [fid]\ncaptions: all\n", "key captions: is unknown; the keys are metrics, count, seed"),
    ("count: 3\n", "key metrics: is missing"),
    ("metrics: {kid: {subset: 3}}\n", "key metrics: kid: option subset=3 is not one of its whole numbers"),
    ("metrics: {fid: {}}\ncaption: last\n", "key caption: must be one of first, random, not 'last'"),
    ("metrics: {fid: {}}\ncount: many\n", "key count: must be a whole number, not 'many'"),
    ("metrics: {fid: {}}\ninception: {size: 3}\n", "key inception.size: is unknown"),
    ("metrics: {fid: {}}\ninception: {input: bytes}\n", "key inception.input: must be uint8 or unit or symmetric, not 'bytes'"),
    ("metrics: {fid: {}}\ninception: {resize: 0}\n", "key inception.resize: must be none or pixels a side, not 0"),
    ("metrics: 3\n", "key metrics: metrics are a list of names, or a mapping from names to options, not 3"),
    ("metrics: {kid: 100}\n", "key metrics: metrics are a list of names, or a mapping from names to options, not {'kid': 100}"),
    ("metrics: [[fid]]\n", "key metrics: \"['fid']\" is no metric"),
])  # fmt: skip
def test_a_wrong_protocol_is_named_by_file_and_key(place, tmp_path, capsys, text, said):
    (tmp_path / "wrong.yaml").write_text(text)
    evaluate(place, tmp_path / "out.json", "--protocol", str(tmp_path / "wrong.yaml"), status=2)
    error = capsys.readouterr().err
    assert f"{tmp_path / 'wrong.yaml'}: {said}" in error
