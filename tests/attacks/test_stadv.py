"""stAdv: its flow loss by hand, its objective, and what it keeps."""

from __future__ import annotations

import math

import pytest
import torch

from robustbench_lite.attacks import RandomNoise, STAdv, paper_flow_loss
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import margin
from robustbench_lite.core.models import predict
from robustbench_lite.core.spatial import Deformation, RotationTranslation


def test_the_flow_loss_by_hand():
    """A 2 x 2 field: the differences across are (3, 4) and 0, those down (0, 5) and (3, 9); each pair counts twice."""
    flow = torch.tensor([[[[0.0, 3.0], [0.0, 0.0]], [[0.0, 4.0], [5.0, -5.0]]]], dtype=torch.float64)
    across = 5 + 10
    down = 5 + math.hypot(3, 9)
    assert paper_flow_loss(flow).item() == pytest.approx(2 * (across + down), abs=1e-6)
    assert paper_flow_loss(torch.ones(3, 2, 4, 5)).tolist() == pytest.approx([2 * (4 * 4 + 3 * 5) * 1e-4] * 3)


def test_the_flow_loss_against_a_sum_over_neighbours():
    flow = torch.randn(2, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sample in range(2):
        total = 0.0
        for i in range(4):
            for j in range(5):
                for k, m in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                    if 0 <= k < 4 and 0 <= m < 5:
                        difference = flow[sample, :, i, j] - flow[sample, :, k, m]
                        total += math.sqrt(difference.square().sum().item() + 1e-8)
        assert paper_flow_loss(flow)[sample].item() == pytest.approx(total)


def test_it_has_a_gradient_where_the_flow_is_constant():
    leaf = torch.zeros(1, 2, 3, 3, requires_grad=True)
    paper_flow_loss(leaf).sum().backward()
    assert leaf.grad.isfinite().all()


def objective(net, images, raw, threat, goal, tau):
    return (-margin(net(threat.apply(images, raw)), goal)).clamp_min(0) + tau * paper_flow_loss(threat.flow(raw))


@pytest.mark.parametrize("smoothness", [0, 1.0])
def test_small_steps_lower_the_objective(smoothness, net, images):
    y, threat = predict(net, images), Deformation(None, smoothness)
    seen = []

    class Spy(Deformation):
        def apply(self, x, point):
            seen.append(point.detach().clone())
            return super().apply(x, point)

    STAdv(steps=60, step_size=0.005, tau=1e-3)(net, images, y, Spy(None, smoothness))
    full = [raw for raw in seen if len(raw) == len(images)]
    first, last = (objective(net, images, raw, threat, Untargeted(y), 1e-3).detach() for raw in (full[0], full[-2]))
    assert (last < first).all()


def test_without_a_budget_the_nearest_success_is_kept(net, images):
    y, threat = predict(net, images), Deformation(None)
    short, long = (STAdv(steps=k, tau=1e-3)(net, images, y, threat) for k in (20, 80))
    assert long.success.sum() > 8
    assert (long.success | ~short.success).all()
    assert (long.distance <= short.distance)[short.success].all()
    assert (predict(net.eval(), threat.apply(images, long.parameters)) != y)[long.success].all()


def test_a_rougher_flow_is_bought_with_a_smaller_tau(net, images):
    y, threat = predict(net, images), Deformation(None, 0)
    rough, smooth = (STAdv(tau=tau)(net, images, y, threat, stop="never") for tau in (1e-5, 5e-3))
    both = rough.success & smooth.success
    loss = [paper_flow_loss(threat.flow(result.parameters))[both].mean() for result in (rough, smooth)]
    assert both.sum() > 4
    assert loss[0] > loss[1]


def test_a_budget_is_kept_and_beats_noise(net, images):
    y, threat = predict(net, images), Deformation(0.4)
    result = STAdv(steps=40, tau=0.001)(net, images, y, threat)
    assert threat.contains(result.parameters, images).all()
    assert result.success.sum() > RandomNoise(draws=41)(net, images, y, threat).success.sum()


def test_a_target_is_reached(net, images):
    target = (predict(net, images) + 1) % 4
    result = STAdv(tau=0.001)(net, images, Targeted(target), Deformation(None, 0))
    assert result.success.float().mean() > 0.6
    assert (predict(net.eval(), result.x_adv) == target)[result.success].all()


def test_a_batch_equals_its_samples(net, images):
    y, threat = predict(net, images), Deformation(1.0)
    whole = STAdv(steps=12)(net, images, y, threat)
    for i in range(0, 12, 4):
        alone = STAdv(steps=12)(net, images[i : i + 1], y[i : i + 1], threat)
        assert torch.allclose(alone.parameters, whole.parameters[i : i + 1], atol=1e-9)
        assert torch.equal(alone.forwards, whole.forwards[i : i + 1])


def test_bad_settings_are_named(net, images):
    for settings, message in [
        ({"steps": 0}, "steps must be a whole number"),
        ({"step_size": 0}, "step_size must be > 0"),
        ({"tau": -1}, "tau must be >= 0"),
        ({"kappa": -1}, "kappa must be >= 0"),
        ({"flow_loss": "papr"}, "did you mean 'paper'"),
    ]:
        with pytest.raises(ValueError, match=message):
            STAdv(**settings)
    with pytest.raises(ValueError, match="does not support"):
        STAdv()(net, images, predict(net, images), RotationTranslation())
