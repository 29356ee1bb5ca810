"""Linear bounds: no point of the threat beats them, affine nets are bounded exactly, rows of every form agree."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify import bounds, graph_of
from robustbench_lite.certify.linear_bounds import LinearBounds
from robustbench_lite.certify.region import Region
from robustbench_lite.certify.rows import Dense, Patch
from robustbench_lite.core.threats import Lp

METHODS = ("ibp", "crown_ibp", "crown", "alpha_crown")
KINDS = [("linf", "pixel"), ("l2", "pixel"), ("l1", "pixel"), ("l0", "pixel"), ("l0", "coordinate")]
DIFFERENCES = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)


def random_threat(draw: random.Random, norm: str, per: str, shape: tuple[int, ...], count: int) -> Lp:
    """A threat of eps from 1e-4 to 1 in linf, or as large in the other norms; often one eps a sample."""
    low, high = draw.choice([(0.0, 1.0), (0.0, 1.0), (-1.0, 2.0), (0.2, 0.7)])
    size, span = math.prod(shape), high - low
    whole = {"linf": 1.0, "l2": math.sqrt(size), "l1": size, "l0": size // (shape[0] if per == "pixel" else 1)}[norm]
    found = [10 ** draw.uniform(-4, 0) * whole * (1 if norm == "l0" else span) for _ in range(count)]
    if norm == "l0":
        found = [float(math.ceil(eps)) for eps in found]
    eps = torch.tensor(found, dtype=torch.float64) if draw.random() < 0.7 else found[0]
    return Lp(norm, eps, (low, high), per)


def climbed(net: nn.Module, x: Tensor, threat: Lp, C: Tensor, steps: int = 100) -> Tensor:
    """Points (S, B, C, H, W) of the threat where the rows of C z, C (S, K), are small: projected gradient descent."""
    count, owner = len(x), torch.arange(len(x)).repeat(len(C))
    start, own = x.repeat(len(C), 1, 1, 1), threat.take(owner)
    goal = C.repeat_interleave(count, 0)
    radius = own.radius(start)
    point, best, least = start.clone(), start.clone(), torch.full((len(start),), torch.inf, dtype=x.dtype)
    for step in range(steps + 1):
        point.requires_grad_()
        value = (net(point) * goal).sum(1)
        (gradient,) = torch.autograd.grad(value.sum(), point, allow_unused=True, materialize_grads=True)
        point, value = point.detach(), value.detach()
        better = value < least
        best[better], least = point[better], torch.minimum(least, value)
        point = moved(own, start, point, -gradient, radius * (1 - step / (steps + 1)) / 2)
    assert own.contains(best, start).all()
    return best.reshape(len(C), count, *x.shape[1:])


def moved(threat: Lp, start: Tensor, point: Tensor, direction: Tensor, size: Tensor) -> Tensor:
    """One projected step; for l0 the pixels or coordinates that a linear function would gain most by."""
    if threat.norm != "l0":
        return threat.project(point + size * threat.steepest(direction), start)
    low, high = threat.bounds
    corner = torch.where(direction > 0, high, low).to(start)
    gain = ((corner - start) * direction).reshape(len(start), -1, *start.shape[2:])
    gain = gain.sum(1, keepdim=True) if threat.per == "pixel" else gain
    rank = gain.flatten(1).argsort(1, descending=True).argsort(1).reshape(gain.shape)
    return torch.where(rank < threat.radius(start), corner, start)


def check_sound(net: nn.Module, x: Tensor, threat: Lp, C: Tensor, points: Callable[..., Tensor], seed: int) -> None:
    """Hold all methods, and their linear forms, against samples and descents; and hold the methods in their order."""
    generator = torch.Generator().manual_seed(seed)
    eps = threat.radius(x).flatten().expand(len(x)).tolist()
    sampled = [
        points(image, threat.norm, e, 150, generator, threat.bounds, threat.per)
        for image, e in zip(x, eps, strict=True)
    ]
    tried = torch.cat([x[None], climbed(net, x, threat, torch.cat([C, -C])), torch.stack(sampled, 1)])
    with torch.no_grad():
        values = net(tried.flatten(0, 1)).reshape(*tried.shape[:2], -1) @ C.T  # (points, B, S)
    slack = 1e-9 * max(1.0, float(values.abs().max()))
    least, most = values.amin(0) + slack, values.amax(0) - slack
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for method in METHODS[threat.norm == "l0" :]:
        if method == "ibp":
            lower, upper = bounds(net, threat, method, C, x=x)
        else:
            lower, upper, forms = bounds(net, threat, method, C, True, x)
            flat = tried.flatten(2).unsqueeze(2)  # (points, B, 1, D)
            below = (forms.lower_slope.flatten(2) * flat).sum(3) + forms.lower_shift
            above = (forms.upper_slope.flatten(2) * flat).sum(3) + forms.upper_shift
            assert (below <= values + slack).all(), f"{method}: a linear form lies above the net"
            assert (above >= values - slack).all(), f"{method}: a linear form lies below the net"
        assert (lower <= least).all(), f"{method}: lower bound beaten by {float((lower - least).max()):.2g}"
        assert (upper >= most).all(), f"{method}: upper bound beaten by {float((most - upper).max()):.2g}"
        found[method] = lower.detach(), upper.detach()
    for loose, tight in (("ibp", "crown_ibp"), ("ibp", "crown"), ("crown", "alpha_crown")):
        if loose in found:
            width = 1e-9 * max(1.0, float(torch.cat(found[loose]).abs().max()))
            assert (found[tight][0] >= found[loose][0] - width).all(), f"{tight} is looser than {loose}"
            assert (found[tight][1] <= found[loose][1] + width).all(), f"{tight} is looser than {loose}"


def check_random_net(seed: int, make_random_net: Callable, points: Callable[..., Tensor]) -> None:
    draw = random.Random(-1 - seed)
    net, shape = make_random_net(seed)
    norm, per = KINDS[seed % len(KINDS)]
    threat = random_threat(draw, norm, per, shape, 2)
    generator = torch.Generator().manual_seed(seed)
    low, high = threat.bounds
    x = low + (high - low) * torch.rand(2, *shape, dtype=torch.float64, generator=generator)
    if draw.random() < 0.3:
        x = torch.where(x > (low + high) / 2, high, low).to(x)  # black and white
    classes = graph_of(net, x).num_classes
    C = torch.randn(2, classes, dtype=torch.float64, generator=generator)
    C[0] = torch.eye(classes)[0] - torch.eye(classes)[1]
    check_sound(net, x, threat, C, points, seed)


@pytest.mark.parametrize("seed", range(30))
def test_no_point_beats_a_bound(seed, make_random_net, threat_points):
    check_random_net(seed, make_random_net, threat_points)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_no_point_beats_a_bound_of_500_nets(block, make_random_net, threat_points):
    failed = []
    for seed in range(1000 + 50 * block, 1050 + 50 * block):
        try:
            check_random_net(seed, make_random_net, threat_points)
        except AssertionError as error:
            failed.append((seed, str(error)))
    assert not failed


def check_kind(net: nn.Module, norm: str, images: Tensor, points: Callable[..., Tensor]) -> None:
    eps = {"linf": [0.02, 0.3], "l2": [0.1, 1.5], "l1": [0.3, 5.0], "l0": [1.0, 4.0]}[norm]
    check_sound(net, images[:2], Lp(norm, torch.tensor(eps, dtype=torch.float64)), DIFFERENCES, points, seed=1)


def test_no_point_beats_a_bound_of_each_kind(net_name, make_net, threat_points, images):
    norm = ("linf", "l2", "l1", "l0")[len(net_name) % 4]  # one of them
    check_kind(make_net(net_name), norm, images, threat_points)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_no_point_beats_a_bound_of_each_kind_in_any_norm(net_name, norm, make_net, threat_points, images):
    check_kind(make_net(net_name), norm, images, threat_points)


# Affine operators: nothing may be lost.


def matrix_of(net: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The matrix and offset of an affine net, one basis image at a time."""
    with torch.no_grad():
        offset = net(torch.zeros(1, *shape, dtype=torch.float64)).flatten(1)
        basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
        rows = net(basis).flatten(1) - offset
    return rows.T, offset[0]


@pytest.mark.parametrize("seed", range(2000, 2060))
def test_rows_over_an_affine_net_are_its_matrix(seed, make_random_net):
    net, shape = make_random_net(seed, linear=True)
    matrix, offset = matrix_of(net, shape)
    x = torch.rand(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    C = torch.randn(2, 3, len(offset), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    *_, forms = bounds(net, (x - 0.1, x + 0.2), "crown", C, return_linear=True)
    scale = float(1 + matrix.abs().sum(1).max())
    for slope, shift in ((forms.lower_slope, forms.lower_shift), (forms.upper_slope, forms.upper_shift)):
        torch.testing.assert_close(slope.flatten(2), C @ matrix, rtol=0, atol=1e-11 * scale)
        torch.testing.assert_close(shift, C @ offset, rtol=0, atol=1e-11 * scale)


def check_hidden_boxes(body: nn.Module, shape: tuple[int, ...]) -> None:
    """Put a ReLU behind an affine net, shifted so that all its neurons are undecided; its boxes must be exact."""
    matrix, offset = matrix_of(body, shape)
    centre = matrix @ torch.full((math.prod(shape),), 0.5, dtype=torch.float64)
    bias = (-centre - offset).reshape(body(torch.zeros(1, *shape, dtype=torch.float64)).shape)
    Shift = type("Shift", (nn.Module,), {"forward": lambda self, x: x + bias})
    whole = nn.Sequential(body, Shift(), nn.ReLU(), nn.Flatten(), nn.Linear(len(offset), 2)).double()
    x = torch.full((2, *shape), 0.5, dtype=torch.float64)
    graph = graph_of(whole, x)
    (relu,) = (node for node in graph.nodes if node.op == "relu")
    eps = torch.tensor([0.1, 0.4], dtype=torch.float64)
    around, scale = eps.reshape(2, 1, 1, 1), float(1 + matrix.abs().sum(1).max())
    for norm, size in (("l1", matrix.abs().amax(1)), ("linf", matrix.abs().sum(1))):
        ball = (x, eps) if norm == "l1" else (None, None)
        with torch.no_grad():
            found = LinearBounds(graph, whole, Region(x - around, x + around, norm, *ball)).values[relu.inputs[0]]
        radius = eps.unsqueeze(1) * size
        torch.testing.assert_close(found.lower.flatten(1), -radius, rtol=0, atol=1e-9 * scale)
        torch.testing.assert_close(found.upper.flatten(1), radius, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("seed", range(2100, 2160))
def test_hidden_boxes_after_affine_layers_are_exact(seed, make_random_net):
    """Single neurons walk back through every operator, as one-hot rows and as patches."""
    net, shape = make_random_net(seed, linear=True)
    check_hidden_boxes(net[: next(i for i, layer in enumerate(net) if isinstance(layer, nn.Flatten))], shape)


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
    "circular": lambda x: F.pad(x, (1, 1, 1, 1), "circular"),
    "replicate": lambda x: F.pad(x, (1, 1, 1, 1), "replicate"),
    "cat": lambda x: torch.cat([x, x[:, :, :, ::2]], 3),
    "broadcast": lambda x: x[:, :, :1] + torch.ones(1, 1, 4, 1, dtype=x.dtype),
    "twice": lambda x: x - 0.5 * x,
}


@pytest.mark.parametrize("name", sorted(COPIES))
def test_copies_of_inputs_are_no_inputs_of_their_own(name, kinds):
    """Interval bounds behind an affine layer take copies for free inputs: rows must go on to the input."""
    torch.manual_seed(0)
    body = nn.Sequential(kinds["Lambda"](COPIES[name]), nn.Conv2d(2, 3, 3, padding=1)).double()
    check_hidden_boxes(body, (2, 5, 4))


def test_planes_around_a_maximum():
    """Above (z_1, z_2) of [0, 1] x [-1, 0.2] lies z_1 + (z_2 + 1) / 6; above four of [0, 1] the constant 1."""
    net = nn.Sequential(nn.MaxPool2d((1, 2)), nn.Flatten()).double()
    low, high = torch.tensor([[0.0, -1.0], [1.0, 0.2]], dtype=torch.float64).reshape(2, 1, 1, 1, 2)
    *_, forms = bounds(net, (low, high), "crown", return_linear=True)
    near = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(forms.upper_slope.flatten(), torch.tensor([1, 1 / 6], dtype=torch.float64), **near)
    torch.testing.assert_close(forms.upper_shift.flatten(), torch.tensor([1 / 6], dtype=torch.float64), **near)
    torch.testing.assert_close(forms.lower_slope.flatten(), torch.tensor([1.0, 0], dtype=torch.float64), **near)
    unit = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    net[0] = nn.MaxPool2d(2)
    *_, forms = bounds(net, (unit, unit + 1), "crown", return_linear=True)
    assert not forms.upper_slope.any() and forms.upper_shift.item() == pytest.approx(1, abs=1e-9)


POOLS: list[nn.Module] = [
    nn.AvgPool2d((3, 2), (2, 1), (1, 1), ceil, include, divisor)
    for ceil, include, divisor in itertools.product((False, True), (False, True), (None, 5))
]


@pytest.mark.parametrize("pool", [*POOLS, nn.AvgPool2d(2, 3), nn.AdaptiveAvgPool2d((3, None))], ids=str)
def test_averages_over_any_windows(pool):
    torch.manual_seed(0)
    check_hidden_boxes(nn.Sequential(nn.Conv2d(1, 2, 2), pool).double(), (1, 9, 8))


def test_branches_of_different_strides_meet(kinds):
    """Their windows start alike and move apart: patches that may not be added as such."""
    torch.manual_seed(0)
    branches = nn.Conv2d(2, 2, 3, 2, 1), nn.Conv2d(2, 2, (6, 5)), nn.AvgPool2d((3, 2), 2, (1, 0))
    body = nn.Sequential(nn.Conv2d(1, 2, 2), kinds["Joined"](lambda a, b, c: a - b + c, *branches)).double()
    check_hidden_boxes(body, (1, 11, 9))


CONVS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), nn.Conv2d(3, 2, 3, 2, 1), nn.ReLU()),
    "dilated": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, 2), nn.Tanh(), nn.Conv2d(4, 2, (1, 3), 1, (0, 2), 2, 2)),
    "pooled": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.AvgPool2d(2, 2, 1), nn.ReLU(), nn.Conv2d(3, 2, 2)
    ),
    "maximum": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2, 2), nn.Conv2d(3, 2, 2), nn.ReLU()),
}


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("name", sorted(CONVS))
def test_patches_equal_dense_rows(name, norm, monkeypatch):
    torch.manual_seed(0)
    body = nn.Sequential(CONVS[name](), nn.Sigmoid(), nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(body, nn.Linear(body(torch.zeros(1, 2, 14, 13)).shape[1], 3)).double()
    x = torch.rand(2, 2, 14, 13, dtype=torch.float64)
    threat = Lp(norm, {"linf": 0.05, "l2": 0.4, "l1": 1.0, "l0": 2.0}[norm])
    patches = 0
    trimmed = Patch.trimmed

    def counted(self):
        nonlocal patches
        found = trimmed(self)
        patches += isinstance(found, Patch)
        return found

    monkeypatch.setattr(Patch, "trimmed", counted)
    with torch.no_grad():
        as_patches = bounds(net, threat, "crown", DIFFERENCES, x=x)
        assert patches > 3
        monkeypatch.setattr(Patch, "trimmed", Patch.dense)
        as_dense = bounds(net, threat, "crown", DIFFERENCES, x=x)
    for ours, theirs in zip(as_patches, as_dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# The input set, by other means.


def _region(norm: str, seed: int, shape: tuple[int, ...], per: str = "pixel") -> tuple[Region, Tensor]:
    """The set around two images, of which one has a corner of the box for its centre, and rows over it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, *shape, dtype=torch.float64, generator=generator)
    x[1] = x[1].round()
    size = math.prod(shape) if norm != "l0" else shape[1] * shape[2]
    eps = (
        torch.rand(2, dtype=torch.float64, generator=generator) ** 2 * {"linf": 1, "l2": 1.5, "l1": 4, "l0": size}[norm]
    )
    region = Region(torch.zeros_like(x), torch.ones_like(x), norm, x, eps.ceil() if norm == "l0" else eps, per)
    if norm == "linf":
        around = eps.reshape(2, 1, 1, 1)
        region = Region((x - around).clamp_min(0), (x + around).clamp_max(1))
    a = torch.randn(6, *shape, dtype=torch.float64, generator=generator)
    a[2, :, 0] = 0
    a[3] *= 1e-3
    a[4] = a[4].sign()  # ties
    a[5] = 0
    return region, a


OWNER = torch.tensor([0, 1, 1, 0, 1, 0])


def least(region: Region, a: Tensor) -> Tensor:
    return region.least(Dense(a, OWNER, tuple(a.shape[1:])))


@pytest.mark.parametrize("seed", range(10))
def test_least_value_over_a_box_is_that_at_its_best_corner(seed):
    region, a = _region("linf", seed, (2, 2, 2))
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 8).reshape(-1, 2, 2, 2)
    for i, found in enumerate(least(region, a)):
        low, high = region.lower[OWNER[i]], region.upper[OWNER[i]]
        assert found == pytest.approx(float((a[i] * (low + corners * (high - low))).flatten(1).sum(1).min()), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_least_value_over_an_l1_ball_in_a_box_is_a_linear_programme(seed):
    region, a = _region("l1", seed, (2, 2, 3))
    for i, found in enumerate(least(region, a)):
        x, row = region.centre[OWNER[i]].flatten().numpy(), a[i].flatten().numpy()
        rooms = [(0, room) for room in (*(1 - x), *x)]  # up and down
        eps = float(region.eps[OWNER[i]])
        answer = linprog(np.r_[row, -row], A_ub=np.ones((1, 24)), b_ub=[eps], bounds=rooms)
        assert float(found) == pytest.approx(answer.fun + row @ x, abs=1e-9)


@pytest.mark.parametrize("per", ["pixel", "coordinate"])
@pytest.mark.parametrize("seed", range(10))
def test_least_value_over_an_l0_ball_is_that_of_the_best_subset(seed, per):
    region, a = _region("l0", seed, (2, 2, 2), per)
    for i, found in enumerate(least(region, a)):
        x, moved = region.centre[OWNER[i]], int(region.eps[OWNER[i]])
        best = math.inf
        for chosen in itertools.combinations(range(4 if per == "pixel" else 8), min(moved, 4)):
            mask = torch.zeros(4 if per == "pixel" else 8, dtype=torch.bool)
            mask[list(chosen)] = True
            mask = mask.reshape(-1, 2, 2).expand(2, 2, 2)
            best = min(best, float((a[i] * torch.where(mask, (a[i] < 0).double(), x)).sum()))
        assert float(found) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_least_value_over_an_l2_ball_in_a_box_is_sound_and_tight(seed):
    region, a = _region("l2", seed, (2, 3, 3))
    for i, found in enumerate(least(region, a)):
        x, row = region.centre[OWNER[i]].flatten().numpy(), a[i].flatten().numpy()
        eps = float(region.eps[OWNER[i]])
        point = best_in_ball(row, x, eps)
        assert np.linalg.norm(point - x) <= eps + 1e-12 and (point >= 0).all() and (point <= 1).all()
        assert float(found) <= row @ point + 1e-12
        assert float(found) >= row @ point - 1e-5 * max(np.linalg.norm(row) * eps, 1e-12)


def best_in_ball(row: np.ndarray, x: np.ndarray, eps: float) -> np.ndarray:
    """The minimiser over the ball in the unit box: x - t a, clipped, as far as the ball reaches (its KKT points)."""

    def at(t: float) -> np.ndarray:
        return np.clip(x - t * row, 0, 1)

    if np.linalg.norm(at(1e12) - x) <= eps:
        return at(1e12)
    low, high = 0.0, 1e12
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(at(middle) - x) <= eps else (low, middle)
    return at(low)


def test_the_l2_oracle_agrees_with_a_solver():
    generator = np.random.default_rng(0)
    for _ in range(5):
        x, row, eps = generator.random(6), generator.standard_normal(6), 0.6
        inside = {"type": "ineq", "fun": lambda v, x=x, eps=eps: eps**2 - ((v - x) ** 2).sum()}
        answer = minimize(lambda v, row=row: row @ v, x, bounds=[(0, 1)] * 6, constraints=[inside], method="SLSQP")
        assert answer.fun == pytest.approx(row @ best_in_ball(row, x, eps), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_least_value_of_patches_is_that_of_their_dense_rows(kind):
    norm, per = kind
    region, _ = _region(norm, 0, (2, 7, 6), per)
    place = torch.tensor([[0, 0], [3, 2], [1, 3], [2, 0], [0, 3], [3, 3]])
    values = torch.randn(6, 2, 4, 3, dtype=torch.float64)
    rows = Patch(values, OWNER, (2, 7, 6), place, (2, 2), (-1, -2)).trimmed()
    assert isinstance(rows, Patch)
    dense = rows.dense()
    for i in range(6):  # by hand
        expected = torch.zeros(2, 20, 20, dtype=torch.float64)
        top, left = (place[i] * 2 - torch.tensor([1, 2]) + 5).tolist()
        expected[:, top : top + 4, left : left + 3] = values[i]
        torch.testing.assert_close(dense.values[i], expected[:, 5:12, 5:11])
    torch.testing.assert_close(region.least(rows), region.least(dense), rtol=1e-12, atol=1e-12)


# CROWN against a dense computation in numpy.


def dense_crown(
    affine: list[tuple[np.ndarray, np.ndarray]], low: np.ndarray, high: np.ndarray, tighten: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of a ReLU net of these (matrix, offset) over a box; undecided neurons' boxes by CROWN if `tighten`."""

    def interval(i: int, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        matrix, offset = affine[i]
        up, down = np.maximum(matrix, 0), np.minimum(matrix, 0)
        return up @ lower + down @ upper + offset, up @ upper + down @ lower + offset

    def crown(i: int, boxes: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        rows, shift = affine[i]
        for (lower, upper), (matrix, offset) in zip(reversed(boxes), reversed(affine[:i]), strict=True):
            on, off = lower >= 0, upper <= 0
            rise = np.where(on, 1.0, np.where(off, 0.0, upper / np.where(on | off, 1.0, upper - lower)))
            below = np.where(on, 1.0, np.where(off, 0.0, (upper >= -lower).astype(float)))
            lift = np.where(on | off, 0.0, -rise * lower)
            shift = shift + np.minimum(rows, 0) @ lift
            rows = np.maximum(rows, 0) * below + np.minimum(rows, 0) * rise
            shift, rows = shift + rows @ offset, rows @ matrix
        return np.maximum(rows, 0) @ low + np.minimum(rows, 0) @ high + shift

    def both(i: int, boxes: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        lower = crown(i, boxes)
        affine[i] = (-affine[i][0], -affine[i][1])
        upper = -crown(i, boxes)
        affine[i] = (-affine[i][0], -affine[i][1])
        return lower, upper

    boxes: list[tuple[np.ndarray, np.ndarray]] = []
    lower, upper = low, high
    for i in range(len(affine)):
        lower, upper = interval(i, lower, upper)
        if i == len(affine) - 1 or (tighten and i):
            better = both(i, boxes)
            open_ = (lower < 0) & (upper > 0) if i < len(affine) - 1 else np.full(lower.shape, True)
            lower = np.where(open_, np.maximum(lower, better[0]), lower)
            upper = np.where(open_, np.minimum(upper, better[1]), upper)
        boxes.append((lower, upper))
        if i < len(affine) - 1:
            lower, upper = np.maximum(lower, 0), np.maximum(upper, 0)
    return lower, upper


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("method", ["crown", "crown_ibp"])
@pytest.mark.parametrize("seed", range(6))
def test_crown_equals_a_dense_computation(seed, method, eps):
    torch.manual_seed(seed)
    stride, channels = 1 + seed % 2, 1 + seed % 3
    parts = [
        nn.Sequential(nn.Conv2d(channels, 3, 3, stride, 1), nn.BatchNorm2d(3)),
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.Sequential(nn.Conv2d(4, 3, (2, 1), padding=1), nn.Flatten()),
        nn.LazyLinear(7),
        nn.Linear(7, 4),
    ]
    net = nn.Sequential(*[layer for part in parts for layer in (part, nn.ReLU())][:-1])
    net(torch.rand(4, channels, 8, 7))
    net = net.double().eval()
    x = torch.rand(2, channels, 8, 7, dtype=torch.float64)
    C = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1], [1, 1, 1, 1]], dtype=torch.float64)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    affine, shape = [], (channels, 8, 7)
    for part in parts:
        affine.append(tuple(t.numpy() for t in matrix_of(part, shape)))
        shape = tuple(part(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
    affine[-1] = (C.numpy() @ affine[-1][0], C.numpy() @ affine[-1][1])
    found = bounds(net, (low, high), method, C)
    for i in range(2):
        expected = dense_crown(affine, low[i].flatten().numpy(), high[i].flatten().numpy(), method == "crown")
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours[i].detach().numpy(), theirs, rtol=1e-9, atol=1e-9)


# What changes nothing.


def small_net(seed: int, make_random_net: Callable) -> tuple[nn.Module, Tensor]:
    """A random net of few neurons, for walks with few rows at a time, and four images."""
    for again in itertools.count(1000 * seed):
        net, shape = make_random_net(again)
        x = torch.rand(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        nodes = [node for node in graph_of(net, x).nodes if node.varies]
        if len(nodes) > 7 and 60 < sum(math.prod(node.shape) for node in nodes) < 400:
            break
    return net, x


@pytest.mark.parametrize("method", METHODS[1:])
def test_at_eps_zero_bounds_are_the_logits(net_name, method, make_net, images):
    net = make_net(net_name)
    logits = net(images)
    for norm in ("linf", "l2", "l1", "l0"):
        for bound in bounds(net, Lp(norm, 0.0), method, x=images):
            torch.testing.assert_close(bound, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [3, 5])
def test_batch_order_and_chunks_change_nothing(seed, kind, make_random_net, monkeypatch):
    net, x = small_net(seed, make_random_net)
    eps = torch.tensor([0.0, 0.01, 0.1, 0.4], dtype=torch.float64)
    eps, norm, per = (eps * 7).ceil().clamp_max(x[0, 0].numel()) if kind[0] == "l0" else eps, *kind
    C = torch.randn(4, 2, graph_of(net, x).num_classes, dtype=torch.float64)
    turn = torch.tensor([3, 0, 2, 1])
    with torch.no_grad():
        for method in METHODS[1:]:
            whole = bounds(net, Lp(norm, eps, per=per), method, C, x=x)
            each = [slice(i, i + 1) for i in range(4)]
            turned = bounds(net, Lp(norm, eps[turn], per=per), method, C[turn], x=x[turn])
            single = [bounds(net, Lp(norm, eps[i], per=per), method, C[i], x=x[i]) for i in each]
            with monkeypatch.context() as patch:
                patch.setattr("robustbench_lite.certify.linear_bounds.FIRST_CHUNK", 3)
                tiny = bounds(net, Lp(norm, eps, per=per), method, C, x=x, memory_budget=1)
            for side in (0, 1):
                size = 1 + float(whole[side].abs().max())
                near = {"rtol": 0, "atol": 1e-10 * size}
                torch.testing.assert_close(turned[side], whole[side][turn], **near)
                torch.testing.assert_close(torch.cat([pair[side] for pair in single]), whole[side], **near)
                torch.testing.assert_close(tiny[side], whole[side], **near)


# Printed fixtures.


def two_neurons(*biases: float) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    net[1].weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    net[1].bias.data = torch.tensor(biases[:2], dtype=torch.float64)
    net[3].weight.data = torch.ones(1, 2, dtype=torch.float64)
    net[3].bias.data = torch.tensor(biases[2:], dtype=torch.float64)
    return net


@pytest.mark.parametrize(
    ("biases", "eps", "clip", "expected", "places"),
    [
        ((0.0, 0.0, 0.0), 0.1, False, (0.8, 1.2), 12),
        ((0.0, 0.0, 0.0), 0.3, False, (0.4, 1.75), 12),
        ((0.0, 0.0, 0.0), 0.5, False, (0.0, 2.35), 12),
        ((0.0, 0.0, 0.0), 0.3, True, (0.4, 1.7364), 4),
        ((0.0, 0.0, 0.0), 0.5, True, (0.0, 2.2882), 4),
        ((-0.6, -0.1, 0.25), 0.1, False, (0.35, 0.80), 12),
        ((-0.6, -0.1, 0.25), 0.2, False, (0.15, 1.10), 12),
    ],
)
@pytest.mark.parametrize("method", ["crown", "crown_ibp", "alpha_crown"])
def test_printed_fixtures(biases, eps, clip, expected, places, method):
    """SEEDS 0.4; with one hidden layer the methods differ in the lower slopes alone."""
    x = torch.tensor([0.5, 0.2], dtype=torch.float64).reshape(1, 1, 1, 2)
    box = ((x - eps).clamp_min(0), (x + eps).clamp_max(1)) if clip else (x - eps, x + eps)
    *_, forms = bounds(two_neurons(*biases), box, method, return_linear=True)  # numbers are cut with intervals
    lower = (least_at(forms.lower_slope[:, 0], box) + forms.lower_shift).item()
    upper = (-least_at(-forms.upper_slope[:, 0], box) + forms.upper_shift).item()
    assert round(upper, places) == pytest.approx(expected[1], abs=1e-12)
    if method == "alpha_crown":
        assert lower >= expected[0] - 1e-12
    else:
        assert round(lower, places) == pytest.approx(expected[0], abs=1e-12)


def least_at(slope: Tensor, box: tuple[Tensor, Tensor]) -> Tensor:
    return (slope * torch.where(slope > 0, *box)).sum((1, 2, 3))
