"""ADef against closed forms: a picture that is a plane moves linearly, so one step is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from robustbench_lite.attacks import ADef
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.spatial import Deformation, RotationTranslation

SIDE = 11


def weights(seed=0, classes=2, border=3):
    """Logit weights (K, 1, 11, 11) that see the middle of the picture only: beyond the border the edge repeats."""
    w = torch.randn(classes, 1, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    middle = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    middle[border:-border, border:-border] = 1
    return w * middle


def linear(w, bias):
    return lambda x: torch.einsum("bchw,kchw->bk", x, w) + bias


def plane(right=0.03, down=-0.02):
    i, j = torch.meshgrid(*[torch.arange(SIDE, dtype=torch.float64)] * 2, indexing="ij")
    return (0.4 + right * j + down * i).reshape(1, 1, SIDE, SIDE)


def margin_bias(w, x, gap):
    """The bias at which class 0 wins at `x` by `gap`."""
    logits = torch.einsum("bchw,kchw->bk", x, w)[0]
    return torch.tensor([(logits[1] - logits[0] + gap).item(), 0.0], dtype=torch.float64)


@pytest.mark.parametrize("smoothness", [0, 1.0])
def test_on_a_plane_one_step_reaches_the_boundary(smoothness):
    """f is linear in the field: the step is -f G a1 / ||a1||^2 with a1 = G a, and its size is that of the answer."""
    w, x, gap = weights(), plane(), 1e-3
    bias = margin_bias(w, x, gap)
    slope = (w[1] - w[0])[0].numpy()
    a = np.stack([slope * 0.03, slope * -0.02])
    if smoothness:
        a = np.stack([gaussian_filter(v, smoothness, mode="constant", radius=3) for v in a])
    raw = gap * a / (a**2).sum()
    flow = np.stack([gaussian_filter(v, smoothness, mode="constant", radius=3) for v in raw]) if smoothness else raw
    result = ADef()(linear(w, bias), x, torch.tensor([0]), Deformation(None, smoothness))
    assert result.success.all()
    assert result.forwards.tolist() == [4]  # the clean check, both sides of the first step, and its candidate
    assert np.allclose(result.parameters[0], 1.02 * raw, atol=1e-12)
    assert result.distance.item() == pytest.approx(1.02 * np.hypot(*flow).max(), rel=1e-9)
    on_boundary = Deformation(None, smoothness).apply(x, result.parameters / 1.02)
    assert linear(w, bias)(on_boundary).diff().item() == pytest.approx(0, abs=1e-12)


def test_without_an_overshoot_the_boundary_is_approached_from_below():
    w, x = weights(), plane()
    bias = margin_bias(w, x, 1e-3) + torch.tensor([1e-12, 0])
    assert not ADef(steps=1, overshoot=0)(linear(w, bias), x, torch.tensor([0]), Deformation(None, 0)).success.any()


def test_the_first_step_uses_central_differences():
    x = torch.rand(1, 1, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w, gap = weights(), 0.1
    slope = (w[1] - w[0])[0].numpy()
    down, right = np.gradient(x[0, 0].numpy())
    a = np.stack([slope * right, slope * down])
    expected = 1.02 * gap * a / (a**2).sum()
    seen = []

    class Spy(Deformation):
        def apply(self, x, point):
            seen.append(point.detach().clone())
            return super().apply(x, point)

    ADef(steps=1)(linear(w, margin_bias(w, x, gap)), x, torch.tensor([0]), Spy(None, 0))
    assert any(np.allclose(point[0], expected, rtol=1e-2, atol=0) for point in seen[3:])


def test_the_class_with_the_smallest_field_is_chosen():
    """Three rivals at equal gaps: the step to class l has the l2 norm gap / ||a_l||, so the steepest one is nearest."""
    w, x = weights(classes=4, seed=3), plane()
    logits = linear(w, 0)(x)[0]
    bias = -logits + torch.tensor([1e-3, 0, 0, 0], dtype=torch.float64)
    steepest = 1 + (w[1:] - w[:1]).flatten(1).norm(dim=1).argmax()
    result = ADef()(linear(w, bias), x, torch.tensor([0]), Deformation(None, 0))
    assert linear(w, bias)(result.x_adv).argmax() == steepest
    assert ADef(classes=2)(linear(w, bias), x, torch.tensor([0]), Deformation(None, 0)).backwards.tolist() == [3]
    assert result.backwards.tolist() == [9]  # three rivals on both sides of the first step, and at its candidate


def test_a_target_is_reached_and_no_other_class():
    w, x = weights(classes=4, seed=3), plane()
    bias = -linear(w, 0)(x)[0] + torch.tensor([1e-3, 0, 0, 0], dtype=torch.float64)
    for target in (1, 2, 3):
        result = ADef()(linear(w, bias), x, Targeted(torch.tensor([target])), Deformation(None))
        assert result.success.all()
        assert linear(w, bias)(result.x_adv).argmax() == target


@pytest.mark.parametrize("smoothness", [0, 1.0])
def test_finds_near_deformations_that_hold(smoothness, net, images):
    y, threat = predict(net, images), Deformation(None, smoothness)
    result = ADef()(net, images, y, threat)
    assert result.success.float().mean() > 0.8
    fallen = result.success
    assert (predict(net.eval(), threat.apply(images, result.parameters))[fallen] != y[fallen]).all()
    shorter = threat.apply(images, 0.9 * result.parameters)
    assert (predict(net, shorter)[fallen] == y[fallen]).float().mean() > 0.6  # it stops at the boundary


def test_a_budget_is_kept(net, images):
    y, threat = predict(net, images), Deformation(0.6)
    result = ADef(steps=30)(net, images, y, threat)
    nearest = ADef(steps=30)(net, images, y, Deformation(None))
    assert threat.contains(result.parameters, images).all()
    assert result.success.sum() >= (nearest.distance <= 0.6).sum() > 0


def test_a_batch_equals_its_samples(net, images):
    y = predict(net, images)
    whole = ADef(steps=10)(net, images, y, Deformation(None))
    for i in range(0, 12, 4):
        alone = ADef(steps=10)(net, images[i : i + 1], y[i : i + 1], Deformation(None))
        assert torch.allclose(alone.parameters, whole.parameters[i : i + 1], atol=1e-9)
        assert torch.equal(alone.forwards, whole.forwards[i : i + 1])


def test_bad_settings_are_named(net, images):
    for settings, message in [
        ({"steps": 0}, "steps must be a whole number"),
        ({"classes": 1}, "classes must be a whole number, at least 2"),
        ({"overshoot": -0.1}, "overshoot must be >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ADef(**settings)
    with pytest.raises(ValueError, match="does not support"):
        ADef()(net, images, predict(net, images), RotationTranslation())


def test_memory_bounds_the_graphs_and_changes_nothing(net, images, monkeypatch):
    """All gradients of a sample come from one graph, so the rows are split."""
    y, asked, pullback = predict(net, images), [], Oracle.pullback

    def spy(self, points, *args, **kwargs):
        asked.append(len(points))
        return pullback(self, points, *args, **kwargs)

    monkeypatch.setattr(Oracle, "pullback", spy)
    for threat in (Deformation(None), Deformation(0.6)):
        whole = ADef(steps=5)(net, images, y, threat)
        assert max(asked) == 12
        asked.clear()
        frugal = ADef(steps=5)(net, images, y, threat, memory_budget=500_000)
        assert 1 < max(asked) < 12
        asked.clear()
        assert torch.allclose(frugal.parameters, whole.parameters, atol=1e-9)
        assert torch.equal(frugal.forwards, whole.forwards)


def test_logits_that_are_not_finite_move_nothing(images):
    """A field with a NaN would crash torch's sampling; a target that no finite logit names is not reached."""

    def fragile(x):
        away = (x - images[:2]).flatten(1).abs().amax(dim=1) > 1e-9
        return x.flatten(1)[:, :3].masked_fill(away.unsqueeze(1), torch.nan)

    target = (images[:2].flatten(1)[:, :3].argmax(dim=1) + 1) % 3
    result = ADef(steps=3)(fragile, images[:2], Targeted(target), Deformation(1.0))
    assert not result.success.any()
    assert result.parameters.isfinite().all()
