"""TextToImage: a folder that holds all of it and nothing that runs, and images that depend on prompt and seed alone."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.evaluation.drawing import Sampler
from nar_t2i.inference import BestOf, Confidence, CriticGuided, EntropyBounded, GibbsSweeps, Likelihood, OneStep, critic_guided
from nar_t2i.networks import TokenCritic
from nar_t2i.pipeline import PARTS, TextToImage
from nar_t2i.types import Known
from tests.tiny_pipeline import CAPTIONS, tiny_pipeline

PROMPTS = [*CAPTIONS, "two red stars", "a square", "three circles and a star", "a blue triangle below a red square"]


@pytest.fixture(scope="module")
def t2i(tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    return tiny_pipeline(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    """In float64, where tokens are equal whatever the batch."""
    return tiny_pipeline(tmp_path_factory.mktemp("vocabulary")).to(dtype=torch.float64)


@pytest.fixture
def saved(t2i: TextToImage, tmp_path: Path) -> Path:
    t2i.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_a_loaded_pipeline_gives_identical_images(t2i: TextToImage, saved: Path) -> None:
    before, after = t2i.sample(PROMPTS, seed=3), TextToImage.from_pretrained(saved).sample(PROMPTS, seed=3)
    assert torch.equal(before.tokens, after.tokens) and torch.equal(before.images, after.images)
    assert len({image.tobytes() for image in before.images.numpy()}) > 1, "the prompts make no difference"


def test_a_folder_can_be_moved_and_needs_nothing_outside(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    t2i = tiny_pipeline(made)
    t2i.save_pretrained(made / "model")
    expected = t2i.sample(PROMPTS).tokens
    shutil.move(made / "model", tmp_path / "moved")
    shutil.rmtree(made)
    again = TextToImage.from_pretrained(tmp_path / "moved")
    assert torch.equal(again.sample(PROMPTS).tokens, expected)
    again.save_pretrained(tmp_path / "moved")  # over itself
    assert torch.equal(TextToImage.from_pretrained(tmp_path / "moved").sample(PROMPTS).tokens, expected)


def test_a_folder_holds_weights_json_and_the_vocabulary(saved: Path) -> None:
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    expected = {f"{name}/{file}" for name in PARTS for file in ("config.json", "weights.safetensors")}
    assert files == expected | {"config.json", "text/tiny.model"}
    assert str(saved) not in "".join(path.read_text() for path in saved.rglob("*.json")), "a path of this machine"


def test_half_precision_weights_take_half_the_room(t2i: TextToImage, saved: Path, tmp_path: Path) -> None:
    t2i.save_pretrained(tmp_path / "half", dtype=torch.float16)
    whole, half = (folder / "network/weights.safetensors" for folder in (saved, tmp_path / "half"))
    assert half.stat().st_size < 0.65 * whole.stat().st_size
    loaded = TextToImage.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
    assert loaded.sample(PROMPTS[:2]).images.shape == (2, 3, 16, 16)


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("class_path", [
    "os.system", "subprocess.Popen", "builtins.eval", "nar_t2i.pipeline.os.system", "nar_t2i.cli.main",
    "nar_t2i.folders.shutil.rmtree", "torch.nn.Linear", "nar_t2i.no.Such", "nothing", "",
])  # fmt: skip
@pytest.mark.parametrize("where", ["config.json", "network/config.json"])
def test_a_foreign_class_is_refused(saved: Path, where: str, class_path: str) -> None:
    def change(config: dict) -> None:
        target = config["inference"] if where == "config.json" else config
        target.update(class_path=class_path, init_args={})

    edit(saved / where, change)
    with pytest.raises(UserError, match="class|part"):
        TextToImage.from_pretrained(saved)


def test_an_interrupted_save_leaves_no_mixture_of_two_models(
    t2i: TextToImage, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nar_t2i.pipeline as module

    save_part = module.save_part

    def interrupted(part: object, place: Path, dtype: object) -> None:
        if place.name == "network":
            raise KeyboardInterrupt
        save_part(part, place, dtype)

    monkeypatch.setattr(module, "save_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        t2i.save_pretrained(saved)
    with pytest.raises(UserError, match="config.json"):
        TextToImage.from_pretrained(saved)


def test_a_foreign_class_inside_the_arguments_is_refused(saved: Path) -> None:
    proof = saved / "proof"
    bomb = {"class_path": "os.mkdir", "init_args": {"path": str(proof)}}
    edit(saved / "tokenizer/config.json", lambda config: config["init_args"].update(quantizer=bomb))
    with pytest.raises(UserError, match="os.mkdir"):
        TextToImage.from_pretrained(saved)
    assert not proof.exists()


@pytest.mark.parametrize("vocabulary", ["../outside.model", "/etc/passwd"])
def test_a_file_outside_the_folder_is_refused(saved: Path, vocabulary: str) -> None:
    shutil.copy(saved / "text/tiny.model", saved / "outside.model")
    edit(saved / "text/config.json", lambda config: config["init_args"].update(vocabulary=vocabulary))
    with pytest.raises(UserError, match="vocabulary"):
        TextToImage.from_pretrained(saved)


@pytest.mark.parametrize("file", ["network/weights.safetensors", "tokenizer/config.json", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_a_damaged_file_is_named(saved: Path, file: str, damage: str) -> None:
    path = saved / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "noise": os.urandom(200)}[damage])
    with pytest.raises(UserError) as caught:
        TextToImage.from_pretrained(saved)
    assert str(path.parent) in str(caught.value)


def test_a_part_of_another_kind_is_refused(saved: Path) -> None:
    shutil.rmtree(saved / "null")
    shutil.copytree(saved / "text", saved / "null")
    with pytest.raises(UserError, match=r"null: a ScratchTextEncoder, and no NullCaption"):
        TextToImage.from_pretrained(saved)


def test_weights_of_another_network_are_refused(saved: Path) -> None:
    edit(saved / "network/config.json", lambda config: config["init_args"].update(width=32))
    with pytest.raises(UserError, match=r"network: Error\(s\) in loading state_dict for .*: size mismatch for \S+: .* shape"):
        TextToImage.from_pretrained(saved)


@pytest.mark.parametrize(("key", "value"), [("activation", "foo"), ("spec", None)])
def test_arguments_that_no_network_takes_are_one_clear_error(saved: Path, key: str, value: object) -> None:
    edit(saved / "network/config.json", lambda config: config["init_args"].update({key: value}))
    with pytest.raises(UserError, match="network"):
        TextToImage.from_pretrained(saved)


@pytest.mark.parametrize("config", [[], {}, {"format": 99}])
def test_another_format_is_refused(saved: Path, config: object) -> None:
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="format"):
        TextToImage.from_pretrained(saved)


# ---- images ----------------------------------------------------------------------------------------------------------


def test_image_i_of_seed_s_is_the_image_of_seed_s_plus_i(exact: TextToImage) -> None:
    together = exact.sample(PROMPTS, seed=11)
    for index, prompt in enumerate(PROMPTS):
        alone = exact.sample(prompt, seed=11 + index)
        assert torch.equal(alone.tokens[0], together.tokens[index])
        assert (alone.images[0].int() - together.images[index].int()).abs().max() <= 1
    own = exact.sample([PROMPTS[0]] * 3, seed=[5, 11, 5])
    assert torch.equal(own.tokens[0], own.tokens[2])
    assert torch.equal(own.tokens[1], together.tokens[0])
    assert not torch.equal(own.tokens[0], own.tokens[1]), "the seed makes no difference"


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_the_batch_size_does_not_matter(exact: TextToImage, batch_size: int) -> None:
    assert torch.equal(exact.sample(PROMPTS, batch_size=batch_size).tokens, exact.sample(PROMPTS).tokens)


def test_a_call_gives_pictures(t2i: TextToImage) -> None:
    images = t2i(PROMPTS[:2], steps=2, guidance_scale=1.5, seed=4)
    expected = t2i.sample(PROMPTS[:2], steps=2, guidance_scale=1.5, seed=4).images.permute(0, 2, 3, 1)
    assert [image.size for image in images] == [(16, 16)] * 2
    assert all(np.array_equal(np.asarray(i), e.numpy()) for i, e in zip(images, expected, strict=True))


def test_steps_and_guidance_override_the_defaults(t2i: TextToImage) -> None:
    default = t2i.sample(PROMPTS)
    assert (default.passes, default.rows) == (4, 8)
    assert (t2i.sample(PROMPTS, steps=7).passes, t2i.sample(PROMPTS, steps=7).rows) == (7, 14)
    unguided = t2i.sample(PROMPTS, guidance_scale=1)
    assert (unguided.passes, unguided.rows) == (4, 4)
    assert not torch.equal(unguided.tokens, default.tokens)
    assert torch.equal(t2i.sample(PROMPTS, steps=4, guidance_scale=3.0).tokens, default.tokens)
    assert t2i.inference.steps == 4 and t2i.guidance.scale == 3.0, "an override stays"


def test_texts_are_encoded_once_whatever_the_passes(t2i: TextToImage) -> None:
    for options in ({"steps": 16}, {"steps": 2, "candidates": 3}):
        before = t2i.text.encoded
        t2i.sample(PROMPTS, **options)
        assert t2i.text.encoded - before == len(PROMPTS)


def test_candidates_are_drawn_and_settings_reach_what_draws_them(exact: TextToImage) -> None:
    plain, one = exact.sample(PROMPTS, steps=4), exact.sample(PROMPTS, steps=4, candidates=1)
    assert torch.equal(plain.tokens, one.tokens) and one[2:] == plain[2:]
    best = exact.sample(PROMPTS, steps=4, candidates=5)
    assert best.passes == 4 + 1 and best.rows == 5 * (2 * 4 + 2)
    assert not torch.equal(best.tokens, plain.tokens)
    assert torch.equal(exact.sample(PROMPTS, steps=4, candidates=5, batch_size=7).tokens, best.tokens)
    exact.inference, before = BestOf(exact.inference, 5), exact.inference
    try:
        assert torch.equal(exact.sample(PROMPTS, steps=4).tokens, best.tokens)
        assert torch.equal(exact.sample(PROMPTS, steps=4, candidates=1).tokens, plain.tokens)
        with pytest.raises(UserError, match="candidates"):
            exact.sample(PROMPTS, candidates=0)
        # What else the pipeline says of its candidates stays.
        exact.inference = BestOf(before, 5, Likelihood(4))
        assert exact.sample(PROMPTS, steps=3, candidates=2)[2:] == (3 + 1, 2 * (2 * 3 + 4))
        # A temperature is that of all draws, steps those of what draws first.
        exact.inference = GibbsSweeps(before, block=16)
        changed = exact.decoding(2, None, 0.0, None)[0]
        assert (changed.temperature, changed.first.temperature, changed.first.steps) == (0.0, 0.0, 2)
        exact.inference = BestOf(Confidence(4, temperature=0.7, final_temperature=0.1), 2)
        first = exact.decoding(None, None, 0.5, None)[0].first
        assert [first.temperature_at(step) for step in range(4)] == [0.5] * 4  # of an annealed one, too
    finally:
        exact.inference = before


def test_temperature_zero_and_one_step_need_no_noise_for_values(t2i: TextToImage) -> None:
    one = TextToImage(t2i.tokenizer, t2i.text, t2i.null, t2i.network, OneStep(), t2i.guidance)
    assert torch.equal(one.sample(PROMPTS, seed=0).tokens, one.sample(PROMPTS, seed=99).tokens)
    assert one.sample(PROMPTS).passes == 1
    with pytest.raises(UserError, match="OneStep has no steps"):
        one.sample(PROMPTS, steps=3)


def test_a_negative_prompt_takes_the_null_captions_place(t2i: TextToImage) -> None:
    plain, led = t2i.sample(PROMPTS), t2i.sample(PROMPTS, negative_prompts="two green circles")
    assert not torch.equal(plain.tokens, led.tokens)
    each = t2i.sample(PROMPTS, negative_prompts=["two green circles"] * len(PROMPTS), batch_size=2)
    assert torch.equal(each.tokens, led.tokens)
    # Away from the prompt itself guidance leads nowhere: u + s·(c − u) = c.
    nowhere = t2i.sample(PROMPTS, negative_prompts=PROMPTS, temperature=0)
    assert torch.equal(nowhere.tokens, t2i.sample(PROMPTS, guidance_scale=1, temperature=0).tokens)
    unguided = t2i.sample(PROMPTS, guidance_scale=1)
    assert torch.equal(t2i.sample(PROMPTS, guidance_scale=1, negative_prompts="a star").tokens, unguided.tokens)


def test_each_prompt_has_its_own_negative_prompt(exact: TextToImage) -> None:
    negative = PROMPTS[::-1]
    whole = exact.sample(PROMPTS, negative_prompts=negative).tokens
    assert torch.equal(exact.sample(PROMPTS, negative_prompts=negative, batch_size=2).tokens, whole)
    assert not torch.equal(exact.sample(PROMPTS, negative_prompts=negative[1:] + negative[:1]).tokens, whole)


def test_known_tokens_stay_and_the_rest_is_drawn(t2i: TextToImage) -> None:
    first = t2i.sample(PROMPTS, seed=1).tokens
    mask = torch.zeros_like(first, dtype=torch.bool)
    mask[:, :9] = True
    mask[3] = True  # all of it known
    mask[4] = False  # nothing known
    edited = t2i.sample(PROMPTS, seed=70, known=Known(mask, first), batch_size=3)
    assert torch.equal(edited.tokens[mask], first[mask])
    assert not torch.equal(edited.tokens[~mask], first[~mask])
    assert torch.equal(edited.tokens[4], t2i.sample(PROMPTS, seed=70, batch_size=3).tokens[4])


def test_known_tokens_are_a_row_a_prompt(t2i: TextToImage) -> None:
    first = t2i.sample(PROMPTS[:1])
    with pytest.raises(UserError, match="known tokens of 1 images for 3 prompts"):
        t2i.sample(PROMPTS[:3], known=Known(torch.ones_like(first.tokens, dtype=torch.bool), first.tokens))


def test_passes_are_those_of_the_longest_batch(exact: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "inference", EntropyBounded(0.5))
    alone = {i: exact.sample([prompt], seed=i) for i, prompt in enumerate(PROMPTS)}
    longest_first = sorted(alone, key=lambda i: -alone[i].passes)
    first, last = (alone[longest_first[end]] for end in (0, -1))
    found = exact.sample([PROMPTS[i] for i in longest_first], seed=longest_first, batch_size=1)
    assert (found.passes, found.rows) == (first.passes, first.rows) and first.passes > last.passes


def test_every_step_of_every_batch_is_told(t2i: TextToImage) -> None:
    steps = []
    t2i.sample(PROMPTS[:5], on_step=steps.append, batch_size=2)
    assert [step.step for step in steps] == [0, 1, 2, 3] * 3
    assert [len(step.tokens) for step in steps] == [2] * 8 + [1] * 4
    assert not steps[3].masked.any()


@pytest.mark.parametrize("prompts, seed, words", [([], 0, "no prompt"), (["a", "b"], [1], "1 seeds for 2 prompts")])
def test_wrong_arguments_are_named(t2i: TextToImage, prompts: list[str], seed: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        t2i.sample(prompts, seed=seed)


@pytest.mark.parametrize("prompt", ["", "   ", "word " * 200, "ein großes 🎈 ЦВЕТ", "a\nb\tc"])
def test_any_text_is_a_prompt(t2i: TextToImage, prompt: str) -> None:
    assert t2i.sample(prompt).images.shape == (1, 3, 16, 16)


def test_with_decoding_is_the_same_pipeline_that_decodes_otherwise(tmp_path):
    t2i = tiny_pipeline(tmp_path)
    other = t2i.with_decoding(steps=3, guidance_scale=1.5, temperature=0.7, candidates=2)
    asked = {"steps": 3, "guidance_scale": 1.5, "temperature": 0.7, "candidates": 2}
    assert torch.equal(other.sample("a red star").images, t2i.sample("a red star", **asked).images)
    assert other.network is t2i.network and t2i.inference.steps != 3 and t2i.guidance.scale != 1.5


def test_a_critic_is_read_once_for_many_batches(tmp_path, monkeypatch):
    t2i = tiny_pipeline(tmp_path)
    critic = TokenCritic(t2i.network.spec, t2i.text.widths, width=16, depth=1, heads=2)
    t2i.network, network = critic, t2i.network
    t2i.save_pretrained(tmp_path / "critic")
    t2i.network, t2i.inference = network, CriticGuided(str(tmp_path / "critic"), steps=2)
    loads = []
    monkeypatch.setattr(critic_guided, "frozen_network", lambda given: loads.append(given) or critic.eval())
    sampler = Sampler(t2i, steps=3, batch_size=2)
    for seed in range(3):
        sampler(["a star", "a circle"], [seed, seed])
    assert len(loads) == 1
