"""No sample beats a bound; at eps = 0 bounds are logits; both front ends and every batch size say the same."""

from __future__ import annotations

import pytest
import torch

from robustbench_lite.certify import bounds
from robustbench_lite.certify.graph import trace
from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.propagate import propagate
from robustbench_lite.core.threats import Lp

EPS = {"linf": (1e-4, 0.05, 1.0), "l2": (1e-4, 0.3, 1.0), "l1": (1e-4, 0.5, 1.0)}
DIFFERENCES = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_ten_thousand_samples_never_beat_a_bound(net_name, norm, make_net, threat_points, images):
    generator = torch.Generator().manual_seed(7)
    for seed, eps in enumerate(EPS[norm]):
        net, x = make_net(net_name, seed), images[seed : seed + 1]
        lower, upper = bounds(net, Lp(norm, eps), x=x)
        low_margin, high_margin = bounds(net, Lp(norm, eps), x=x, C=DIFFERENCES)
        with torch.no_grad():
            logits = torch.cat([net(chunk) for chunk in threat_points(x[0], norm, eps, 3334, generator).split(500)])
        margins = logits @ DIFFERENCES.T
        slack = 1e-9 * max(1.0, float(logits.abs().max()))
        assert (lower - slack <= logits).all()
        assert (logits <= upper + slack).all()
        assert (low_margin - slack <= margins).all()
        assert (margins <= high_margin + slack).all()


def test_at_eps_zero_bounds_are_the_logits(net_name, make_net, images):
    net = make_net(net_name)
    logits = net(images)
    for norm in EPS:
        for bound in bounds(net, Lp(norm, 0.0), x=images):
            torch.testing.assert_close(bound, logits, rtol=1e-9, atol=1e-9)
    for bound in bounds(net, (images, images)):
        torch.testing.assert_close(bound, logits, rtol=1e-9, atol=1e-9)


def test_both_front_ends_give_the_same_bounds(net_name, make_net, images):
    net = make_net(net_name)
    box = Interval((images - 0.1).clamp(min=0), (images + 0.1).clamp(max=1))
    with torch.no_grad():
        found = [propagate(trace(net, images, (front,)), net, box, DIFFERENCES) for front in ("fx", "export")]
    torch.testing.assert_close(found[0].lower, found[1].lower, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0].upper, found[1].upper, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_batch_is_its_images_one_by_one(net_name, norm, make_net, images):
    net = make_net(net_name)
    eps = torch.tensor([0.0, 0.01, 0.1, 0.3, 1.0], dtype=torch.float64)
    C = torch.randn(5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = bounds(net, Lp(norm, eps), C=C, x=images)
    for i in range(5):
        alone = bounds(net, Lp(norm, eps[i : i + 1]), C=C[i : i + 1], x=images[i : i + 1])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-9, atol=1e-9)


def test_bounds_grow_with_the_threat(net_name, make_net, images):
    net = make_net(net_name)
    for norm, sizes in EPS.items():
        inner = bounds(net, Lp(norm, sizes[1] / 2), x=images)
        outer = bounds(net, Lp(norm, sizes[1]), x=images)
        assert (outer[0] <= inner[0] + 1e-9).all()
        assert (outer[1] >= inner[1] - 1e-9).all()


def test_the_elided_last_layer_is_never_looser(net_name, make_net, images):
    net = make_net(net_name)
    lower, upper = bounds(net, Lp("linf", 0.1), x=images)
    elided, _ = bounds(net, Lp("linf", 0.1), x=images, C=DIFFERENCES)
    plain = lower @ DIFFERENCES.clamp(min=0).T + upper @ DIFFERENCES.clamp(max=0).T
    assert (elided >= plain - 1e-9).all()
