from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from torch import Tensor, nn

from robustbench_lite.core.insides import Rejecting, Uncertain
from robustbench_lite.core.models import ABSTAIN
from robustbench_lite.defenses import _likely_scales
from robustbench_lite.defenses._gaussian_process import condition, posterior
from robustbench_lite.defenses._likely_scales import NOISE_FLOOR, likely_scales
from robustbench_lite.defenses.gaussian_process_head import GaussianProcessHead, _balanced
from tests.defenses.contract_cases import blobs, fitted

SCALES = torch.tensor([math.log(0.7), math.log(1.3), math.log(0.05)], dtype=torch.float64)


def problem(n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    targets = torch.stack([points[:, 0].sin(), points[:, 1] * points[:, 2]], dim=1)
    targets += 0.2 * torch.randn(n, 2, dtype=torch.float64, generator=generator)
    return points, targets, torch.randn(15, 3, dtype=torch.float64, generator=generator)


def clusters() -> tuple[Tensor, Tensor]:
    """Points of three classes, well apart as in the last layer of a net, and their labels +-1."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    centres, noise = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (3, 60))
    return centres[labels] + 0.1 * noise, 2 * nn.functional.one_hot(labels, 3).double() - 1


def reference(scales: Tensor, **settings: object) -> GaussianProcessRegressor:
    signal, length, noise = scales.exp().tolist()
    kernel = ConstantKernel(signal) * RBF(length) + WhiteKernel(noise)
    return GaussianProcessRegressor(kernel, alpha=0, **settings)


def test_mean_and_variance_are_those_of_another_implementation() -> None:
    points, targets, x = problem()
    mean, variance = posterior(x, points, *condition(points, targets, SCALES), SCALES)
    other = reference(SCALES, optimizer=None).fit(points, targets)
    their_mean, deviation = other.predict(x.numpy(), return_std=True)
    assert torch.allclose(mean, torch.as_tensor(their_mean), rtol=1e-6, atol=1e-7)
    noise = SCALES[2].exp()  # theirs is that of a new label, ours that of the function
    assert torch.allclose(variance, torch.as_tensor(deviation[:, 0] ** 2) - noise, rtol=1e-5, atol=1e-7)


def test_the_scales_found_are_as_likely_as_those_of_another_implementation() -> None:
    points, targets, _ = problem()
    found = reference(likely_scales(points, targets), optimizer=None).fit(points, targets)
    other = reference(SCALES, n_restarts_optimizer=2, random_state=0).fit(points, targets)
    assert found.log_marginal_likelihood_value_ >= other.log_marginal_likelihood_value_ - 1e-3


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
def test_the_scales_found_follow_the_points(size: float) -> None:
    points, targets = clusters()
    scales = likely_scales(points, targets)
    larger = likely_scales(points * size, targets)
    assert torch.allclose(larger, scales + torch.tensor([0.0, math.log(size), 0.0]), atol=1e-4)


def test_the_likelihood_is_exact_for_many_points_too() -> None:
    points, targets, _ = problem()
    with _likely_scales.gpytorch.settings.max_cholesky_size(10):  # above it the library would iterate, from draws
        few = likely_scales(points, targets)
    assert torch.allclose(few, likely_scales(points, targets), atol=1e-6)
    assert torch.allclose(likely_scales(points.float(), targets.float()), few, atol=1e-3)
    assert few.dtype == likely_scales(points.float(), targets.float()).dtype == torch.float64


def test_far_from_data_it_knows_nothing() -> None:
    points, targets, _ = problem()
    given = condition(points, targets, SCALES)
    mean, variance = posterior(points[:1] + 100, points, *given, SCALES)
    assert mean.abs().max() < 1e-12
    assert variance.item() == pytest.approx(0.7)
    assert (posterior(points, points, *given, SCALES)[1] < 0.05).all()  # less than the noise of one label


def test_the_gradients_are_right() -> None:
    points, targets, x = problem(12)
    given = condition(points, targets, SCALES)
    assert torch.autograd.gradcheck(lambda q: posterior(q, points, *given, SCALES), x[:3].requires_grad_())


def test_identical_points_can_be_fitted() -> None:
    points = torch.zeros(20, 2, dtype=torch.float64)
    targets = torch.ones(20, 1, dtype=torch.float64)
    scales = likely_scales(points, targets)
    assert scales.isfinite().all()
    assert (scales[2] - scales[0]).item() == pytest.approx(math.log(NOISE_FLOOR), abs=0.1)
    assert condition(points, targets, scales)[1].isfinite().all()


def test_answers_and_score() -> None:
    head = fitted("GaussianProcessHead")
    assert isinstance(head, GaussianProcessHead)
    assert isinstance(head, Rejecting)
    assert isinstance(head, Uncertain)
    x = blobs(20, "test", 2).images
    mean, variance = head.mean_and_variance(x)
    logits, score = head.answer(x)
    noise = head.scales[2].exp()
    assert torch.equal(logits, mean.float())
    assert torch.allclose(score.double(), -mean.max(dim=1).values / (variance + noise).sqrt())
    quantile = torch.distributions.Normal(0.0, 1.0).cdf(-score)  # the answered class's label is positive
    assert ((quantile > 0.5) == (mean.amax(dim=1) > 0)).all()


def test_noise_is_refused_and_the_threshold_keeps_the_rate() -> None:
    head = fitted("GaussianProcessHead")
    noise = torch.rand(100, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    assert (head.predict(noise) == ABSTAIN).double().mean() > 0.9
    assert (head.predict(blobs(90, "calibration", 1).images) == ABSTAIN).sum() == 4  # 5 % of 90


def test_loading_conditions_it_again() -> None:
    head = fitted("GaussianProcessHead")
    assert isinstance(head, GaussianProcessHead)
    saved = head.state_dict()
    assert not any("inverse" in name or "_weights" in name for name in saved)
    other = GaussianProcessHead(head.net, size=60)
    other.load_state_dict(saved)
    x = blobs(5, "test", 2).images
    assert torch.equal(other(x), head(x))
    assert not other.threshold.isnan()


def test_the_kept_samples_are_balanced() -> None:
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] * 20)
    chosen = _balanced(labels, 30)
    assert len(set(chosen.tolist())) == 30
    assert torch.bincount(labels[chosen]).tolist() in ([13, 5, 12], [12, 5, 13])


WITHOUT = """
import sys
sys.modules["gpytorch"] = None
import torch
from robustbench_lite.data import load_data
from robustbench_lite.zoo import load_defense
data = load_data("digits")
head = load_defense("digits/gaussian_process")
before = head(data.images)
print(float((head(data.images).argmax(dim=1) == data.labels).double().mean()))
try:
    head.learn(load_data("digits", split="train"))
except ModuleNotFoundError as error:
    print(error, torch.equal(head(data.images), before))
"""


def test_it_loads_without_the_library_that_fits_it_and_a_fit_that_fails_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    accuracy, refusal = done.stdout.splitlines()
    assert float(accuracy) > 0.9
    assert "robustbench_lite[gp]" in refusal
    assert refusal.endswith("True")


def test_faults_are_named() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(ValueError, match="size"):
        GaussianProcessHead(net, size=1)
    with pytest.raises(ValueError, match="size=500"):
        GaussianProcessHead(net).learn(blobs())
