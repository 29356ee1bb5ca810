"""alpha-CROWN optimises, never loses, and stays below the linear relaxation, which stays below exact minima."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.certify import CROWN, AlphaCROWN, bounds, exact_margins, graph_of, relaxation_bounds
from robustbench_lite.certify.inputs import input_region
from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.linear_bounds import LinearBounds, specification_rows
from robustbench_lite.certify.slopes import Ascent, Climb
from robustbench_lite.core.threats import Lp


def tilted() -> nn.Module:
    """relu(x) - 0.4 x: CROWN takes slope 1 or 0 below the relu; over [-1, 1.2] the best is 0.4, which proves 0."""

    class Tilted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (torch.relu(x) - 0.4 * x).flatten(1)

    return Tilted()


def test_a_slope_in_the_inside_is_found():
    low = torch.full((1, 1, 1, 1), -1.0, dtype=torch.float64)
    box = (low, torch.full_like(low, 1.2))
    *_, crown = bounds(tilted(), box, "crown", return_linear=True)
    *_, alpha = bounds(tilted(), box, "alpha_crown", return_linear=True)

    def proven(forms) -> float:
        slope = forms.lower_slope.flatten()
        return float((slope * torch.where(slope > 0, box[0].flatten(), box[1].flatten())).sum() + forms.lower_shift)

    assert proven(crown) == pytest.approx(-0.6, abs=1e-9)  # slope 1: 0.6 x at -1
    assert proven(alpha) > -0.1
    assert alpha.lower_slope.item() == pytest.approx(0.0, abs=0.1)


def relu_net(seed: int, *widths: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def residual_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.skip = nn.Conv2d(1, 2, 2), nn.Conv2d(1, 2, 1, 2)
            self.down, self.head = nn.Conv2d(2, 2, 2, 2, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.down(torch.relu(self.conv(x))) + self.skip(x)
            return self.head(torch.relu(h).flatten(1))

    return Residual().double()


TINY: dict[str, Callable[[int], nn.Module]] = {
    "one hidden layer": lambda seed: relu_net(seed, 9, 8, 3),
    "two hidden layers": lambda seed: relu_net(seed, 9, 6, 6, 3),
    "three hidden layers": lambda seed: relu_net(seed, 9, 5, 5, 5, 3),
    "residual": residual_net,
}
C = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)


def chain(net: nn.Module, x: Tensor, threat: Lp) -> dict[str, Tensor]:
    """Lower bounds (B, S) of C z, from loose to tight."""
    found = {
        m: bounds(net, threat, m, C, x=x)[0].detach()
        for m in ("ibp", "crown_ibp", "crown")
        if m != "ibp" or threat.norm != "l0"
    }
    graph, region = graph_of(net, x), input_region(threat, x, ("linf", "l2", "l1", "l0"))
    with torch.no_grad():
        own = LinearBounds(graph, net, region, C)
    found["alpha_crown"] = torch.maximum(
        Ascent(steps=60).best(own, specification_rows(C, len(x))).reshape(len(x), -1), found["crown"]
    )
    boxes = {i: box for i, box in enumerate(own.values) if isinstance(box, Interval) and box.lower.isfinite().all()}
    found["relaxation"] = relaxation_bounds(net, x, threat, C, boxes)
    found["exact"], attained = exact_margins(net, x, threat, C)
    torch.testing.assert_close(found["exact"], attained, rtol=0, atol=1e-5)
    return found


@pytest.mark.parametrize("norm", ["linf", "l1", "l0"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_methods_stand_in_their_order_below_the_exact_minimum(name, norm):
    gaps: dict[str, list[float]] = {}
    for seed in range(3):
        net = TINY[name](seed)
        x = torch.rand(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        threat = Lp(norm, {"linf": 0.25, "l1": 1.0, "l0": 2.0}[norm])
        found = chain(net, x, threat)
        order = [m for m in ("ibp", "crown", "alpha_crown", "relaxation", "exact") if m in found]
        for loose, tight in itertools.pairwise(order):
            assert (found[loose] <= found[tight] + 1e-6).all(), (loose, tight, (found[loose] - found[tight]).max())
        assert (found["crown_ibp"] <= found["exact"] + 1e-6).all()
        for method, value in found.items():
            gaps.setdefault(method, []).append(float((found["exact"] - value).mean()))
    mean = {method: sum(values) for method, values in gaps.items()}
    assert mean["alpha_crown"] < mean["crown"] - 1e-4, "the slopes were not optimised"
    assert mean["alpha_crown"] - mean["relaxation"] < 0.5 * (mean["crown"] - mean["relaxation"]) + 1e-6


@pytest.mark.parametrize("name", ["mlp", "leaky_relu", "residual", "max_pool", "normalized", "conv_groups", "tanh"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_no_row_is_ever_worse_than_crowns(name, norm, make_net, images):
    net, threat = make_net(name), Lp(norm, {"linf": 0.1, "l2": 0.7, "l1": 3.0, "l0": 3.0}[norm])
    y = net(images).argmax(1)
    crown = CROWN()(net, images, y, threat).margins
    for options in ({}, {"steps": 1}, {"step_size": 50.0}, {"steps": 3, "step_size": 1e-3}):
        assert (AlphaCROWN(**options)(net, images, y, threat).margins >= crown - 1e-12).all()


def test_interval_bounds_of_the_same_boxes_are_kept():
    """Of SEEDS 0.4's second net at eps 0.2: 0.25 by intervals, 0.15 by CROWN's lines, which one short step leaves."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    net[1].weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    net[1].bias.data = torch.tensor([-0.6, -0.1], dtype=torch.float64)
    net[3].weight.data = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    net[3].bias.data = torch.tensor([0.25 - 1, 0.0], dtype=torch.float64)  # margins below 0 are not proven
    x = torch.tensor([0.5, 0.2], dtype=torch.float64).reshape(1, 1, 1, 2)
    found = AlphaCROWN(steps=1, step_size=1e-3)(net, x, torch.tensor([0]), Lp("linf", 0.2, (-1.0, 2.0)))
    assert found.margins[0, 1].item() == pytest.approx(0.25 - 1, abs=1e-9)


def test_hidden_slopes_help_too_and_never_hurt():
    net = relu_net(1, 9, 8, 8, 3)
    x = torch.rand(3, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, threat = net(x).argmax(1), Lp("linf", 0.3)
    last, joint = (AlphaCROWN(joint=joint)(net, x, y, threat).margins for joint in (False, True))
    exact = exact_margins(net, x, threat, torch.eye(3)[y][:, None].double() - torch.eye(3).double())[0]
    others = ~nn.functional.one_hot(y, 3).bool()
    assert (joint >= last - 1e-12).all()
    assert (joint[others] > last[others] + 1e-4).any()
    assert (joint[others] <= exact[others] + 1e-6).all()


def test_the_best_step_is_kept_though_steps_overshoot(monkeypatch):
    """Steps far too long throw the slopes from end to end; what is returned is the best bound met on the way."""
    net = relu_net(3, 9, 8, 8, 3)
    x = torch.rand(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    region, graph = input_region(Lp("linf", 0.3), x, ("linf",)), graph_of(net, x)
    rows = specification_rows(C, 2)
    with torch.no_grad():
        own = LinearBounds(graph, net, region, C)
        met = []
        least = type(region).least
        monkeypatch.setattr(type(region), "least", lambda self, r: met.append(least(self, r)) or met[-1])
        best = Ascent(steps=8, step_size=30.0).best(own, rows)
        shifts = len(met)
        monkeypatch.undo()
        values = []
        for steps in range(9):  # the bound after each number of steps alone
            climb = Ascent(steps=steps, step_size=30.0)
            values.append(climb.best(own, rows))
    assert shifts == 9
    for earlier, later in itertools.pairwise(values):
        assert (later >= earlier - 1e-12).all()
    torch.testing.assert_close(best, values[-1])


def test_slopes_that_are_returned_give_the_bounds_that_are_returned():
    net = relu_net(4, 9, 8, 8, 3)
    x = torch.rand(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    region, graph = input_region(Lp("l2", 0.6), x, ("l2",)), graph_of(net, x)
    rows = specification_rows(C, 2)
    with torch.no_grad():
        own = LinearBounds(graph, net, region, C)
    for rule in (Ascent(), Ascent(steps=8, step_size=20.0)):
        best, slopes = rule.best(own, rows), rule.best_slopes(own, rows)
        each = own.take(rows.samples)
        with torch.no_grad():
            lines = {i: each.lines(each.graph.nodes[i]).chosen(slope) for i, slope in slopes.items()}
            again = each.lower(graph.output, type(rows)(rows.values, None, rows.shape), lines)
        torch.testing.assert_close(again, best, rtol=1e-10, atol=1e-10)
        assert all(((slope >= 0) & (slope <= 1)).all() for slope in slopes.values())


def test_rows_that_are_proven_leave(monkeypatch):
    net = relu_net(5, 9, 8, 8, 3)
    x = torch.rand(6, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    y = net(x).argmax(1)
    radius = CROWN().radius(net, x, y, "linf", tolerance=1e-4)
    threat = Lp("linf", radius * 1.02)  # a little more than CROWN proves
    sizes: list[int] = []
    step = Climb.step

    def counted(self, gradients, lines):
        sizes.append(len(self.slopes[0]))
        step(self, gradients, lines)

    monkeypatch.setattr(Climb, "step", counted)
    found = AlphaCROWN()(net, x, y, threat)
    assert found.certified.any()
    assert sizes[0] <= 12
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]
    sizes.clear()
    easy = AlphaCROWN()(net, x, y, Lp("linf", radius * 0.5))
    assert easy.certified.all() and not sizes  # CROWN had proven all of them


@pytest.mark.parametrize("count", [1, 4])
def test_rows_do_not_see_each_other(count):
    """A row's bound is the same alone, beside others, and in chunks: each has slopes of its own."""
    net = relu_net(6, 9, 8, 8, 3)
    x = torch.rand(4, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    threat = Lp("linf", torch.tensor([0.05, 0.2, 0.3, 0.5], dtype=torch.float64))
    whole = bounds(net, threat, "alpha_crown", C, x=x)
    for s in range(3):
        alone = bounds(net, threat, "alpha_crown", C[s : s + 1], x=x)
        for ours, theirs in zip(alone, whole, strict=True):
            torch.testing.assert_close(ours[:, 0], theirs[:, s], rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(bounds(net, threat, "alpha_crown", C, x=x, memory_budget=count), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_single_precision_stays_near_double():
    net = relu_net(7, 9, 8, 8, 3)
    x = torch.rand(4, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    double = {m: bounds(net, Lp("linf", 0.1), m, C, x=x) for m in ("crown_ibp", "crown", "alpha_crown")}
    net.float()
    for method, expected in double.items():
        for ours, theirs in zip(bounds(net, Lp("linf", 0.1), method, C, x=x.float()), expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_joint_ascent_of_margins_that_are_all_proven():
    net = relu_net(0, 4, 6, 3)
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    certificate = AlphaCROWN(joint=True, steps=2)(net, x, net(x).argmax(1), Lp("linf", 1e-6))
    assert certificate.certified.all()
