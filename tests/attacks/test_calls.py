"""Calling an attack: what `Attack` itself promises, whichever attack it is."""

from __future__ import annotations

import pytest
import torch

from robustbench_lite.attacks import FGSM, PGD, Attack, RandomNoise
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import cross_entropy
from robustbench_lite.core.models import predict
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp
from tests.attacks.contract_cases import generator, true_labels


@pytest.fixture
def y():
    return true_labels()


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("targeted", [False, True])
def test_stop_never_moves_every_sample(loss, targeted, net, images):
    """The clean input is no candidate: its loss is another one than the attack's."""

    y = predict(net, images)
    goal = Targeted((y + 1) % 4) if targeted else y
    result = PGD(steps=5, loss=loss)(net, images, goal, Lp("linf", 0.05), stop="never")
    assert ((result.x_adv != images).flatten(1).any(dim=1)).all()


def test_stop_never_keeps_a_loss_at_least_as_high(net, images, y):
    threat = Lp("linf", 0.05)
    early = PGD(steps=10)(net, images, y, threat)
    late = PGD(steps=10)(net, images, y, threat, stop="never")
    assert (late.backwards == 10).all()
    assert torch.equal(early.success, late.success)
    gain = cross_entropy(net(late.x_adv), Untargeted(y)) - cross_entropy(net(early.x_adv), Untargeted(y))
    assert gain.min() >= -1e-9


def test_bad_calls_say_what_is_wrong(net, images, y):
    for attack, arguments, options, message in [
        (PGD(), (net, images, y, Lp("l0", 3)), {}, "does not support"),
        (PGD(), (net, images, y, Lp("linf", None)), {}, "does not support"),
        (PGD(), (net, images * 255, y, Lp("linf", 0.1)), {}, "divide by 255"),
        (PGD(), (net, images, y + 9, Lp("linf", 0.1)), {}, r"labels must be in 0 .. 3"),
        (PGD(), (net, images, y[:3], Lp("linf", 0.1)), {}, r"shape \(12,\)"),
        (PGD(), (net, images, y, Lp("linf", 0.1)), {"stop": "sometimes"}, "stop must be"),
        (PGD(), (net, images, y, Lp("linf", 0.1)), {"max_queries": 0}, "max_queries must be at least 1"),
        (PGD(), (net, images, y, Lp("linf", 0.1)), {"indices": torch.arange(3)}, "indices must have shape"),
        (FGSM(), (net, images, y, RotationTranslation()), {}, "does not support"),
        (PGD(), (net, images, y, Lp("linf", torch.full((9,), 0.1))), {}, "one value for each of the 12 images, got 9"),
        (PGD(), (net, images, y, Lp("linf", torch.full((15,), 0.1))), {}, "one value for each of the 12 images"),
        (PGD(), (net, images, y, Lp("l2", 128)), {}, "divide by 255"),
    ]:
        with pytest.raises(ValueError, match=message):
            attack(*arguments, **options)
    for build, message in [
        (lambda: PGD(steps=0), "steps must be a whole number"),
        (lambda: PGD(restarts=0), "restarts must be a whole number"),
        (lambda: PGD(step_size=-1), "step_size must be > 0"),
        (lambda: PGD(restarts=2, random_start=False), "would all be the same"),
        (lambda: PGD(loss="cee"), "did you mean 'ce'"),
        (lambda: PGD(density=0), "density"),
        (lambda: RandomNoise(draws=0), "draws must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


def test_bad_types_say_what_is_wrong(net, images, y):
    for arguments, options, message in [
        ((None, images, y, Lp("linf", 0.1)), {}, "a model is a callable"),
        ((net, images, y.tolist(), Lp("linf", 0.1)), {}, "a goal is"),
        ((net, images, y, "linf"), {}, "a threat is"),
        ((net, images, y, Lp("linf", 0.1)), {"indices": [1, 2]}, "indices must be an int64 tensor, got list"),
        ((lambda x: net(x.sub_(0.1)), images.clone(), y, Lp("linf", 0.1)), {}, "in place"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            PGD()(*arguments, **options)


def test_attacks_without_gradients_work_in_inference_mode(net, images, y):
    with torch.inference_mode():
        inside = RandomNoise(draws=5)(net, images, y, Lp("linf", 0.3))
    assert torch.equal(inside.x_adv, RandomNoise(draws=5)(net, images, y, Lp("linf", 0.3)).x_adv)


def test_images_that_require_a_gradient_come_back_without_one(net, images, y):
    assert not PGD()(net, images.clone().requires_grad_(), y, Lp("linf", 0.1)).x_adv.requires_grad


def test_a_lying_attack_is_not_believed(net, images, y):
    class Liar(Attack):
        def supports(self, threat):
            return True

        def run(self, oracle, x, goal, threat, streams):
            x = x.clone()
            x[1] = float("nan")
            x[2] = 1 - x[2]  # far outside
            return x

    result = Liar()(net, images, y, Lp("linf", 0.05))
    assert torch.equal(result.x_adv[1:3], images[1:3])
    assert not result.success[1:].any()


def test_an_attack_that_returns_its_own_points_is_judged(net, images, y):
    class Last(Attack):
        def supports(self, threat):
            return True

        def run(self, oracle, x, goal, threat, streams):
            return threat.random_point(x, streams)

    result = Last()(net, images, y, Lp("linf", 0.3), generator=generator())
    assert result.success.sum() > 1
    assert torch.equal(predict(net, result.x_adv) != y, result.success)
    assert result.forwards.tolist() == [1] + [2] * 11
