"""Metrics over features against closed forms, brute force and torchmetrics; what must not matter does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from nar_t2i.errors import UserError
from nar_t2i.evaluation.metrics import METRICS, ClipScore, Cmmd, Compared, Fid, Kid, PrecisionRecall, metric
from nar_t2i.evaluation.metrics.frechet import frechet_distance, moments
from nar_t2i.evaluation.metrics.kernel import biased_mmd, cubic, unbiased_mmd


class AsTheyAre(nn.Module):
    """torchmetrics' place for a network."""

    num_features = 6

    def forward(self, features):
        return features


def features(count, width=6, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator)
    return (torch.randn(count, width, generator=torch.Generator().manual_seed(seed + 1)) @ mixed + shift).float()


def gaussian(count, mean, covariance, seed):
    """Samples whose mean and covariance are exactly these."""
    drawn = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    drawn = drawn - drawn.mean(0)
    whitened = drawn @ torch.linalg.inv(torch.linalg.cholesky(drawn.T @ drawn / (count - 1))).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def test_fid_of_two_gaussians_is_the_closed_form():
    """Of diagonal covariances: Σ (μ₁ − μ₂)² + (σ₁ − σ₂)². Of others: by the root of a matrix that is known."""
    one = gaussian(500, torch.tensor([0.0, 1.0, 2.0]).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0])).double(), 0)
    two = gaussian(300, torch.tensor([1.0, 1.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 4.0, 1.0])).double(), 1)
    assert Fid().numbers(Compared(one, two))["value"] == pytest.approx(5.0 + 1.0 + 0.0 + 4.0, rel=1e-9)
    root = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()  # Σ₁ = root², Σ₂ = 4 Σ₁: the root of the product is 2 Σ₁
    covariance = root @ root
    value = frechet_distance(torch.zeros(2).double(), covariance, torch.ones(2).double(), 4 * covariance)
    assert value == pytest.approx(2 + float(covariance.trace()) * (1 + 4 - 4), rel=1e-9)


@pytest.mark.parametrize("count", [4, 400])  # with less samples than features, too
def test_fid_of_identical_sets_is_zero(count):
    same = features(count)
    assert Fid().numbers(Compared(same, same.clone()))["value"] < 1e-9
    assert Fid().numbers(Compared(same, same + 0.1))["value"] == pytest.approx(0.06, rel=1e-3)


def test_fid_is_torchmetrics_own():
    drawn, real = features(300), features(200, seed=5, shift=0.4)
    theirs = FrechetInceptionDistance(AsTheyAre())
    theirs.update(drawn.double(), real=False)
    theirs.update(real.double(), real=True)
    assert Fid().numbers(Compared(drawn, real))["value"] == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_kid_is_brute_force_and_torchmetrics_own():
    drawn, real = features(40), features(31, seed=5, shift=0.3)
    x, y = drawn.double(), real.double()

    def k(a, b):
        return float((a @ b / 6 + 1) ** 3)

    wanted = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (40 * 39)
    wanted += sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (31 * 30)
    wanted -= 2 * sum(k(a, b) for a in x for b in y) / (40 * 31)
    assert Kid().numbers(Compared(drawn, real))["value"] == pytest.approx(wanted, rel=1e-9)
    theirs = KernelInceptionDistance(AsTheyAre(), subsets=1, subset_size=31)
    theirs.update(drawn[:31].double(), real=False)
    theirs.update(real.double(), real=True)
    assert Kid().numbers(Compared(drawn[:31], real))["value"] == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_kid_is_unbiased_and_the_biased_estimate_is_not():
    """Of two draws of one distribution it is 0 on average; the control, which pairs samples with themselves, is far from it."""
    pairs = [features(2 * 12, width=3, seed=seed).double().split(12) for seed in range(400)]
    whitened = [(a, b) for a, b in pairs]
    fair = np.array([unbiased_mmd(a, b, cubic) for a, b in whitened])
    biased = np.array([biased_mmd(a, b, cubic) for a, b in whitened])
    assert abs(fair.mean()) < 3 * fair.std() / 20 and (fair < 0).any()
    assert biased.mean() > 3 * biased.std() / 20


def test_kid_of_pictures_of_the_same_captions_is_unbiased_where_pairs_are_left_out():
    """Each drawn picture is half the real one of its caption; the control compares them as if they were strangers."""
    fair, naive = [], []
    for seed in range(400):
        real, own = features(2 * 12, width=3, seed=seed).double().split(12)
        drawn = real * 0.8 + own * 0.6  # of the same distribution
        fair.append(Kid().numbers(Compared(drawn, real, paired=True))["value"])
        naive.append(Kid().numbers(Compared(drawn, real))["value"])
        assert Kid(subsets=3, subset_size=12).numbers(Compared(drawn, real, paired=True))["value"] == pytest.approx(fair[-1])
    fair, naive = np.array(fair), np.array(naive)
    assert abs(fair.mean()) < 3 * fair.std() / 20 and naive.mean() < -3 * naive.std() / 20


def test_kid_over_subsets():
    drawn, real = features(60), features(50, seed=5, shift=0.3)
    found = Kid(subsets=200, subset_size=20).numbers(Compared(drawn, real))
    whole = Kid().numbers(Compared(drawn, real))["value"]
    assert abs(found["value"] - whole) < 4 * found["deviation"] / 200**0.5 and found["deviation"] > 0
    assert found == Kid(subsets=200, subset_size=20).numbers(Compared(drawn, real))
    assert found != Kid(subsets=200, subset_size=20, seed=1).numbers(Compared(drawn, real))
    with pytest.raises(UserError, match="subset_size 51 must be between 2 and the 50 samples"):
        Kid(subsets=2, subset_size=51).result(Compared(drawn, real))


def test_precision_and_recall_are_brute_force():
    drawn, real = features(50, width=2), features(60, width=2, seed=5, shift=1.0)

    def share(samples, others, k):
        inside = 0
        for sample in samples.double():
            for index, other in enumerate(others.double()):
                rest = torch.cat([others[:index], others[index + 1 :]]).double()
                inside += bool((sample - other).norm() <= (rest - other).norm(dim=1).sort().values[k - 1])
                if (sample - other).norm() <= (rest - other).norm(dim=1).sort().values[k - 1]:
                    break
        return inside / len(samples)

    for k in (1, 3):
        found = PrecisionRecall(k).numbers(Compared(drawn, real))
        assert found == {"precision": share(drawn, real, k), "recall": share(real, drawn, k)}
        assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1
    assert PrecisionRecall().numbers(Compared(real, real)) == {"precision": 1.0, "recall": 1.0}
    assert PrecisionRecall().numbers(Compared(real + 1000, real)) == {"precision": 0.0, "recall": 0.0}
    # All drawn pictures alike: each lies among the real ones, and they cover few of these.
    narrow = PrecisionRecall().numbers(Compared(real[:1] + 1e-4 * features(50, width=2), real))
    assert narrow["precision"] == 1.0 and narrow["recall"] < 0.2


def test_cmmd_is_its_formula():
    drawn, real = (nn.functional.normalize(features(n, seed=n), dim=1) for n in (30, 20))
    x, y = drawn.double(), real.double()

    def mean(a, b):
        return float(torch.exp(-(torch.cdist(a, b) ** 2) / 200).mean())

    wanted = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert Cmmd().numbers(Compared(drawn, real))["value"] == pytest.approx(wanted, rel=1e-6)
    assert Cmmd().numbers(Compared(drawn, drawn))["value"] < 1e-9 < wanted


def test_clip_score_is_its_formula():
    drawn = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    texts = torch.tensor([[2.0, 0.0], [3.0, 3.0], [-1.0, 0.0]])
    scores = np.array([100, 100 / 2**0.5, 0.0])  # a caption that points the other way counts as nothing
    found = ClipScore().numbers(Compared(drawn, None, texts))
    assert found["value"] == pytest.approx(scores.mean()) and found["standard_error"] == pytest.approx(scores.std(ddof=1) / 3**0.5)


@pytest.mark.parametrize("name", METRICS)
def test_the_order_of_samples_and_the_blocks_of_a_matrix_do_not_matter(name, monkeypatch):
    drawn, real, texts = features(70), features(55, seed=5, shift=0.3), features(70, seed=9)
    found = METRICS[name]().numbers(Compared(drawn, real, texts))
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    again = METRICS[name]().numbers(Compared(drawn[order], real.flip(0), texts[order]))
    assert again == pytest.approx(found, rel=1e-9)
    monkeypatch.setattr(metric.blocks, "__defaults__", (16,))
    assert METRICS[name]().numbers(Compared(drawn, real, texts)) == pytest.approx(found, rel=1e-9)
    assert METRICS[name]().numbers(Compared(drawn * 1.1, real, texts[order])) != pytest.approx(found, rel=1e-9)


def test_results_tell_how_they_were_made_and_too_few_samples_are_refused():
    drawn, real = features(8), features(9, seed=5)
    found = replace(Kid(), subsets=3, subset_size=5).result(Compared(drawn, real))
    assert found["samples"] == 8 and found["real_samples"] == 9 and found["features"] == "inception"
    assert found["protocol"]["subsets"] == 3 and "unbiased" in found["protocol"]["about"]
    assert "NOT FID" in METRICS["scene_frechet"]().result(Compared(drawn, real))["protocol"]["about"]
    with pytest.raises(UserError, match="fid needs at least 2 samples, drawn and real; there are 1"):
        Fid().result(Compared(drawn, real[:1]))
    assert moments(drawn)[1].dtype == torch.float64
