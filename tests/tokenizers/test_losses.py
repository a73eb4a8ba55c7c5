"""What a tokenizer is trained on: against hand calculations."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from nar_t2i.errors import UserError
from nar_t2i.tokenizers.losses import (
    PatchDiscriminator,
    PerceptualLoss,
    adaptive_weight,
    discriminator_loss,
    edge_loss,
)
from tests.tokenizers.random_vgg import random_vgg


def test_edges():
    image = torch.zeros(1, 1, 4, 4)
    image[..., 2:] = 1.0  # one vertical edge: 4 of 12 horizontal differences
    assert edge_loss(image, torch.zeros_like(image)) == pytest.approx(4 / 12)
    assert edge_loss(image + 3, image) == pytest.approx(0)


def test_hinge():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert discriminator_loss(real, fake) == pytest.approx(0.5 * (0.25 + 0.5))


def test_adaptive_weight_by_hand():
    last = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction, adversarial = (3 * last).sum(), (last * torch.tensor([0.3, 0.4])).sum()
    expected = (2 * 9) ** 0.5 / (0.5 + 1e-4)
    assert adaptive_weight(reconstruction, adversarial, last) == pytest.approx(expected)
    assert adaptive_weight(reconstruction, 0 * adversarial, last, largest=7.0) == 7.0
    assert not adaptive_weight(reconstruction, adversarial, last).requires_grad
    assert last.grad is None
    (reconstruction + adversarial).backward()  # the graph is still there


def test_a_patch_discriminator_sees_patches():
    torch.manual_seed(0)
    net = PatchDiscriminator((16, 32))
    image = torch.randn(1, 3, 32, 32)
    logits = net(image)
    assert logits.shape == (1, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(image).dtype == torch.float32


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A folder with random VGG-16 features in each form that is read."""
    folder = tmp_path_factory.mktemp("vgg")
    state = random_vgg()
    save_file(state, folder / "vgg.safetensors")
    whole = {f"features.{k}": v for k, v in state.items()} | {"classifier.0.weight": torch.zeros(2)}
    torch.save(whole, folder / "vgg.pth")
    save_file({k: v for k, v in state.items() if k != "28.bias"}, folder / "cut.safetensors")
    torch.save({k: v[:1] for k, v in state.items()}, folder / "thin.pth")
    torch.save([1, 2], folder / "list.pth")
    (folder / "text.pth").write_text("no weights")
    (folder / "text.safetensors").write_text("no weights")
    return folder


def test_perception(vgg):
    loss = PerceptualLoss(str(vgg / "vgg.safetensors"))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert loss(images, images) == 0
    near, far = images + 0.05 * torch.randn_like(images), torch.rand_like(images)
    assert 0 < loss(near, images) < loss(far, images)
    near.requires_grad_()
    loss(near, images).backward()
    assert near.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in loss.parameters()) and not loss.train().training
    torch.testing.assert_close(PerceptualLoss(str(vgg / "vgg.pth"))(far, images), loss(far, images))


def test_perception_by_hand(vgg):
    torch.manual_seed(0)
    images, targets = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    state, mean, std = random_vgg(), torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    features = [((z + 1) / 2 - mean[:, None, None]) / std[:, None, None] for z in (images, targets)]
    total, index = 0.0, 0
    for block, convolutions in enumerate((2, 2, 3, 3, 3)):
        if block:
            features, index = [F.max_pool2d(x, 2) for x in features], index + 1
        for _ in range(convolutions):
            weight, bias = state[f"{index}.weight"], state[f"{index}.bias"]
            features, index = [F.conv2d(x, weight, bias, padding=1).relu() for x in features], index + 2
        x, y = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in features)
        total += (x - y).square().sum(1).mean()
    torch.testing.assert_close(PerceptualLoss(str(vgg / "vgg.safetensors"))(images, targets), total)


@pytest.mark.parametrize("name", ["cut.safetensors", "thin.pth", "list.pth", "text.pth", "text.safetensors"])
def test_wrong_files(vgg, name):
    with pytest.raises(UserError, match=f"{name} does not hold the features of a VGG-16"):
        PerceptualLoss(str(vgg / name))


def test_a_missing_file(vgg):
    with pytest.raises(UserError, match="there is no weights file"):
        PerceptualLoss(str(vgg / "none.pth"))
