"""What holds for every walk along the decision boundary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robustbench_lite.attacks import Boundary, FoolboxAttack, HopSkipJump, LowFrequencyBoundary
from robustbench_lite.core.models import predict
from robustbench_lite.core.threats import Lp
from tests.attacks.contract_cases import generator


@pytest.mark.parametrize("kind", [Boundary, HopSkipJump])
@pytest.mark.parametrize("queries", [1, 30, 150])
def test_its_own_limit_is_kept(kind, queries, net, images):
    y = predict(net, images)
    result = kind(queries=queries)(net, images, y, Lp("l2", None), generator=generator())
    assert result.forwards.max() <= queries + 1  # and the clean check


@pytest.mark.parametrize("kind", [Boundary, HopSkipJump])
def test_samples_wrong_from_the_start_walk_on_without_harm(kind, net, images):
    """With stop="never" they are not done: the walk ends beside the clean image, at a distance of next to nothing."""
    x = images.float()
    net = net.float()
    y = (predict(net, x) + 1) % 4
    fed = []
    net.register_forward_hook(lambda _, args, logits: fed.append(args[0].isfinite().all().item()))
    for eps in (0.5, None):
        result = kind()(net, x, y, Lp("l2", eps), max_queries=600, stop="never", generator=generator())
        assert result.success.all()
        assert (result.distance == 0).all()
    assert all(fed)


@pytest.mark.slow
def test_no_weaker_than_foolbox_at_equal_queries(shared_data):
    from robustbench_lite.zoo import load_defense

    with np.load(shared_data / "mnist.npz") as file:
        x = torch.from_numpy(file["x_test"][:4]).float().reshape(-1, 1, 28, 28) / 255
        y = torch.from_numpy(file["y_test"][:4]).long()
    net = load_defense("mnist/standard")

    def distance(attack):
        return attack(net, x, y, Lp("l2", None), max_queries=600, generator=generator()).distance

    boundary = distance(Boundary())
    assert (boundary <= distance(FoolboxAttack("BoundaryAttack"))).all()
    assert (distance(LowFrequencyBoundary()) <= boundary).all()
    jumps = distance(HopSkipJump()) / distance(FoolboxAttack("HopSkipJumpAttack"))
    assert jumps.log().mean().exp() < 1.1
