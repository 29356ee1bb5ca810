"""Gradient ascent on parameters: budgets, strength against random points, independence of the samples."""

from __future__ import annotations

import pytest
import torch

from robustbench_lite.attacks import FlowPGD, RandomNoise, RotationTranslationPGD
from robustbench_lite.core.models import predict
from robustbench_lite.core.spatial import Deformation, RotationTranslation
from robustbench_lite.core.threats import Lp

CASES = [
    (FlowPGD, Deformation(0.4)),
    (FlowPGD, Deformation(0.3, 0)),
    (RotationTranslationPGD, RotationTranslation(20, 1)),
]


def ramp_model(slope=1.0, bias=-3.0):
    """Class 1 where the mean brightness-weighted column is large: moving the picture right raises its logit."""

    def model(x):
        columns = torch.arange(x.shape[-1], dtype=x.dtype)
        score = slope * (x * columns).flatten(1).sum(dim=1) / 4 + bias
        return torch.stack([-score, score], dim=1) / 2

    return model


def dots(n=6):
    """One bright pixel in the middle of a black 9 x 9 picture, at column 3."""
    x = torch.zeros(n, 1, 9, 9, dtype=torch.float64)
    x[:, 0, 4, 3] = 1
    return x


@pytest.mark.parametrize(("attack", "threat"), CASES)
def test_points_never_leave_the_budget(attack, threat, net, images):
    seen = []

    class Spy(type(threat)):
        def apply(self, x, point):
            seen.append((point.detach(), x))
            return super().apply(x, point)

    spy = Spy(**vars(threat))
    attack(steps=8, restarts=2)(net, images, predict(net, images), spy)
    assert len(seen) > 8
    assert all(threat.contains(point, x).all() for point, x in seen)


@pytest.mark.parametrize(("attack", "threat"), CASES)
def test_beats_as_many_random_points(attack, threat, net, images):
    y = predict(net, images)
    ours = attack(steps=20)(net, images, y, threat)
    noise = RandomNoise(draws=21)(net, images, y, threat)
    assert ours.success.sum() > noise.success.sum()


@pytest.mark.parametrize(("attack", "threat"), CASES)
def test_more_restarts_never_hurt_and_cost_only_those_that_stand(attack, threat, net, images):
    y = predict(net, images)
    once, more = (attack(steps=5, restarts=k)(net, images, y, threat) for k in (1, 4))
    assert (more.success | ~once.success).all()
    assert torch.equal(more.forwards[once.success], once.forwards[once.success])


def test_a_shift_is_found_to_the_end_of_its_budget():
    """The dot's column decides: it can be moved by the whole budget, and no farther."""
    x, y = dots(), torch.zeros(6, dtype=torch.int64)
    threat = RotationTranslation(0, 2)
    reach = 3 + 2  # columns
    for slack, falls in ((0.05, True), (-0.05, False)):
        model = ramp_model(slope=4.0, bias=-(reach - slack))
        assert (predict(model, x) == 0).all()
        assert (RotationTranslationPGD(steps=30)(model, x, y, threat).success == falls).all()


@pytest.mark.parametrize(("attack", "threat"), CASES)
def test_a_batch_equals_its_samples(attack, threat, net, images):
    y, search = predict(net, images), attack(steps=6, restarts=2)
    whole = search(net, images, y, threat, generator=torch.Generator().manual_seed(5))
    for i in range(0, 12, 5):
        rows, generator = slice(i, i + 1), torch.Generator().manual_seed(5)
        alone = search(net, images[rows], y[rows], threat, indices=torch.tensor([i]), generator=generator)
        assert torch.allclose(alone.parameters, whole.parameters[rows], atol=1e-10)
        assert torch.equal(alone.forwards, whole.forwards[rows])


def test_bad_settings_are_named(net, images):
    for settings, message in [
        ({"steps": 0}, "steps must be a whole number"),
        ({"restarts": 1.5}, "restarts must be a whole number"),
        ({"step_size": 0}, "step_size must be > 0"),
        ({"momentum": 1}, "momentum must be in"),
        ({"loss": "margn"}, "did you mean 'margin'"),
    ]:
        with pytest.raises(ValueError, match=message):
            FlowPGD(**settings)
    for threat in (Deformation(None), RotationTranslation(), Lp("linf", 0.1)):
        with pytest.raises(ValueError, match="does not support"):
            FlowPGD()(net, images, predict(net, images), threat)
