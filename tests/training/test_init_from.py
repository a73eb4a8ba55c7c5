"""Starting from other weights: what is taken over, what is resized, and what is said about the rest."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nar_t2i.errors import UserError
from nar_t2i.files import write_json
from nar_t2i.networks.tokens import CodeVectors
from nar_t2i.training import checkpoints
from nar_t2i.training.init_from import check_frozen, load_weights


class Net(nn.Module):
    def __init__(self, length=4, width=3, grid=None, extra=False):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.position = nn.Parameter(torch.randn(length, width))
        if grid is not None:
            self.position.position_grid = grid
        if extra:
            self.extra = nn.Linear(2, 2)


def checkpoint(tmp_path, model, **more):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": model.state_dict(), **more}, path)
    return path


def test_everything_that_fits_is_taken_over(tmp_path):
    source, target = Net(), Net()
    report = load_weights(target, checkpoint(tmp_path, source))
    assert set(report.loaded) == set(target.state_dict())
    assert all(torch.equal(source.state_dict()[k], v) for k, v in target.state_dict().items())
    assert str(report) == f"init_from {tmp_path / 'a.ckpt'}: 3 tensors taken over"


def test_partial_matches_are_listed(tmp_path):
    source, target = Net(extra=True), Net()
    target.head = nn.Linear(2, 2)
    target.frozen = nn.Linear(2, 2).requires_grad_(False)
    target.linear.bias = nn.Parameter(torch.zeros(5))
    report = load_weights(target, checkpoint(tmp_path, source))
    assert report.missing == ["head.weight", "head.bias"]
    assert report.unexpected == ["extra.weight", "extra.bias"]
    assert report.wrong_shape == {"linear.bias": ((3,), (5,))}
    assert "missing: head.weight, head.bias" in str(report) and "wrong shape: linear.bias (3,) → (5,)" in str(report)


def test_long_lists_are_cut(tmp_path):
    target = Net()
    target.more = nn.ModuleList(nn.Linear(1, 1) for _ in range(9))
    assert "and 13 more" in str(load_weights(target, checkpoint(tmp_path, Net())))


def test_averaged_weights_are_preferred(tmp_path):
    source = Net()
    average = {"linear.weight": torch.full((3, 3), 7.0)}
    target = Net()
    report = load_weights(target, checkpoint(tmp_path, source, callbacks={"EMA": {"updates": 3, "average": average}}))
    assert report.averaged and "(averaged)" in str(report)
    assert torch.equal(target.linear.weight, average["linear.weight"])
    assert torch.equal(target.linear.bias, source.linear.bias)


def test_lengths_are_interpolated_linearly(tmp_path):
    source, target = Net(length=4), Net(length=8)
    report = load_weights(target, checkpoint(tmp_path, source))
    assert report.resized == ["position"]
    at = (np.arange(8) + 0.5) / 2 - 0.5
    expected = np.stack([np.interp(at, np.arange(4), column) for column in source.position.detach().numpy().T], 1)
    np.testing.assert_allclose(target.position.detach(), expected, atol=1e-6)


@pytest.mark.parametrize("length", [2, 7])
def test_a_word_keeps_its_place(tmp_path, length):
    source, target = Net(length=4), Net(length=length)
    target.position.position_counts = True
    before = target.position.detach().clone()
    assert load_weights(target, checkpoint(tmp_path, source)).resized == ["position"]
    both = min(4, length)
    assert torch.equal(target.position[:both], source.position[:both]) and torch.equal(target.position[both:], before[both:])


def test_what_the_tokenizer_says_of_its_codes_stays(tmp_path):
    source, target = nn.Module(), nn.Module()
    for module, scale in ((source, 1.0), (target, 2.0)):
        module.linear, module.codes = nn.Linear(2, 2), CodeVectors(3, 2)
        module.codes.adopt(torch.tensor([[scale, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    kept = target.codes.vectors.clone()
    report = load_weights(target, checkpoint(tmp_path, source))
    assert report.kept == ["codes.vectors"] and "kept, of another tokenizer: codes.vectors" in str(report)
    assert torch.equal(target.codes.vectors, kept) and torch.equal(target.linear.weight, source.linear.weight)
    assert load_weights(source, checkpoint(tmp_path, source)).kept == []
    halves = checkpoint(tmp_path, source)
    source.codes.vectors.data *= 1.0004  # as what was stored in halves is rounded
    assert load_weights(source, halves).kept == []


def test_frozen_weights_that_come_from_nowhere_are_refused(tmp_path):
    target = Net(extra=True)
    for p in target.extra.requires_grad_(False).parameters():
        p.from_elsewhere = True
    check_frozen(target, load_weights(target, checkpoint(tmp_path, Net(extra=True))))
    check_frozen(Net(), None)
    with pytest.raises(UserError, match="a.ckpt has none that fit for extra.weight, extra.bias"):
        check_frozen(target, load_weights(target, checkpoint(tmp_path, Net())))
    with pytest.raises(UserError, match="init_from names none for extra.weight"):
        check_frozen(target, None)


def test_grids_are_interpolated_in_two_dimensions(tmp_path):
    source, target = Net(length=16, grid=(4, 4)), Net(length=64, grid=(8, 8))
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    with torch.no_grad():
        source.position.copy_(torch.stack([rows, columns, rows * 0 + 2], -1).reshape(16, 3))
    assert load_weights(target, checkpoint(tmp_path, source)).resized == ["position"]
    grid = target.position.detach().reshape(8, 8, 3)
    expected = (torch.arange(8) + 0.5) / 2 - 0.5
    inner = slice(3, 5)  # bicubic reproduces straight lines away from the border
    assert torch.allclose(grid[inner, 3, 0], expected[inner], atol=1e-5)
    assert torch.allclose(grid[3, inner, 1], expected[inner], atol=1e-5)
    assert torch.allclose(grid[..., 2], torch.full((8, 8), 2.0), atol=1e-5)


def test_a_grid_of_another_form_is_not_guessed(tmp_path):
    report = load_weights(Net(length=16, grid=(4, 4)), checkpoint(tmp_path, Net(length=7)))
    assert "position" in report.wrong_shape


def test_pipeline_folders(tmp_path):
    source = Net()
    for part, state in (("network", source.state_dict()), ("tokenizer", {"w": torch.ones(1)})):
        (tmp_path / part).mkdir()
        save_file(state, tmp_path / part / "weights.safetensors")

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = Net()

    target = Module()
    report = load_weights(target, tmp_path)
    assert len(report.loaded) == 3 and report.unexpected == ["tokenizer.w"]
    assert torch.equal(target.network.linear.weight, source.linear.weight)


def test_a_bare_network_file_fits_a_module_that_holds_it(tmp_path):
    source = Net()
    save_file(source.state_dict(), tmp_path / "n.safetensors")
    target = nn.ModuleDict({"network": Net()})
    assert len(load_weights(target, tmp_path / "n.safetensors").loaded) == 3


@pytest.mark.parametrize("given", ["network", "other", "other/weights.safetensors"])
def test_a_part_goes_into_the_part_that_it_fits_and_no_other(tmp_path, given):
    """Whose parts have layers of the same names and shapes, as networks and text encoders have."""
    target, source = nn.ModuleDict({"text": Net(length=2), "network": Net(extra=True), "other_one": Net(width=2)}), Net(extra=True)
    (tmp_path / given.partition("/")[0]).mkdir()
    save_file(source.state_dict(), tmp_path / given.partition("/")[0] / "weights.safetensors")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    report = load_weights(target, tmp_path / given)
    assert report.loaded == [f"network.{name}" for name in source.state_dict()] and not report.unexpected
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items() if "network" not in name)


@pytest.mark.parametrize("given", ["other/weights.safetensors", "other", "network/weights.safetensors", "."])
def test_a_network_of_another_width_is_no_text_encoder_of_that_width(tmp_path, monkeypatch, given):
    """By its names it is a network; that of its tensors more would fit into the text encoder does not matter."""
    target, source = nn.ModuleDict({"text": Net(), "network": Net(width=5, extra=True)}), Net(extra=True)
    for folder in ("other", "network"):
        (tmp_path / folder).mkdir()
        save_file(source.state_dict(), tmp_path / folder / "weights.safetensors")
    monkeypatch.chdir(tmp_path / "network")
    report = load_weights(target, tmp_path / given if given != "." else ".")
    assert set(report.loaded) == {"network.extra.weight", "network.extra.bias"} and "network.linear.weight" in report.wrong_shape


def test_a_part_that_fits_two_parts_alike_is_refused(tmp_path):
    target = nn.ModuleDict({"text": Net(), "network": Net()})
    (tmp_path / "network").mkdir()
    for file in ("n.safetensors", "network/weights.safetensors"):
        save_file(Net().state_dict(), tmp_path / file)
    with pytest.raises(UserError, match=r"n.safetensors fits network and text alike; name a folder"):
        load_weights(target, tmp_path / "n.safetensors")
    assert len(load_weights(target, tmp_path / "network").loaded) == 3


def test_run_folders_give_their_newest_checkpoint(tmp_path):
    source = Net()
    folder = tmp_path / "checkpoints/step-00000003.ckpt"
    folder.mkdir(parents=True)
    files = {checkpoints.RUN: checkpoints.write_file(folder / checkpoints.RUN, {"state_dict": source.state_dict()})}
    write_json(folder / checkpoints.MANIFEST, {"format": checkpoints.FORMAT, "files": files})
    for path in (tmp_path, tmp_path / "checkpoints", folder):
        target = Net()
        load_weights(target, path)
        assert torch.equal(target.linear.weight, source.linear.weight)


def test_wrappers_in_names_do_not_matter(tmp_path):
    source, target = Net(), Net()
    torch.save({f"module._orig_mod.{k}": v for k, v in source.state_dict().items()}, tmp_path / "a.pt")
    assert len(load_weights(target, tmp_path / "a.pt").loaded) == 3


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_weights(Net(), tmp_path / "nope")
    with pytest.raises(UserError, match="holds neither"):
        load_weights(Net(), tmp_path)
    (tmp_path / "cut.ckpt").write_bytes(checkpoint(tmp_path, Net()).read_bytes()[:500])
    with pytest.raises(UserError, match="cut.ckpt is not a whole checkpoint"):
        load_weights(Net(), tmp_path / "cut.ckpt")
    torch.save({"other": torch.ones(1)}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="nothing in .*b.pt fits this model; it holds other, the model has position"):
        load_weights(Net(), tmp_path / "b.pt")
    torch.save({"state_dict": Net().state_dict(), "object": Net()}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="holds more than tensors"):
        load_weights(Net(), tmp_path / "c.pt")
