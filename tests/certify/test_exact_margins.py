"""Exact minima against enumerations of activation patterns, grids and printed fixtures; relaxations against linprog."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify import bounds, exact_margins, graph_of, relaxation_bounds
from robustbench_lite.certify._milp import Programme
from robustbench_lite.certify.errors import UnsupportedOperator
from robustbench_lite.certify.intervals import Interval
from robustbench_lite.core.threats import Lp


def layered(sizes: tuple[int, ...], activation: nn.Module, seed: int) -> nn.Sequential:
    """A random net over images (1, 1, sizes[0])."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), activation]
            nn.init.normal_(layers[-2].weight)
            nn.init.normal_(layers[-2].bias, std=0.3)
        return nn.Sequential(*layers[:-1]).double().eval()


def by_patterns(net: nn.Sequential, slope: float, regions: list[tuple[np.ndarray, np.ndarray, float]], x, c) -> float:
    """The minimum of c z over a union of sets {x + d : low <= d <= high, |d|_1 <= budget}: one programme a pattern.

    Variables are d's parts upward and downward; a pattern says of each hidden neuron whether it is active.
    """
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    sizes = [layer.out_features for layer in linear[:-1]]
    best = np.inf
    for pattern in itertools.product((0, 1), repeat=sum(sizes)):
        matrix, offset = np.eye(len(x)), x.copy()
        rows, limits = [], []
        signs = iter(pattern)
        for layer in linear[:-1]:
            matrix = layer.weight.detach().numpy() @ matrix
            offset = layer.weight.detach().numpy() @ offset + layer.bias.detach().numpy()
            active = np.array([next(signs) for _ in offset])
            turn = np.where(active, -1.0, 1.0)
            rows.append(turn[:, None] * matrix)
            limits.append(-turn * offset)
            factor = np.where(active, 1.0, slope)
            matrix, offset = factor[:, None] * matrix, factor * offset
        last = c @ linear[-1].weight.detach().numpy()
        constant = last @ offset + c @ linear[-1].bias.detach().numpy()
        A, b = np.concatenate(rows), np.concatenate(limits)
        for low, high, budget in regions:
            both = np.concatenate([A, -A], axis=1)
            found = linprog(
                np.concatenate([last @ matrix, -last @ matrix]),
                A_ub=np.concatenate([both, np.ones((1, 2 * len(x)))]),
                b_ub=np.append(b, budget),
                bounds=[(0, h) for h in high] + [(0, -v) for v in low],
            )
            if found.status == 0:
                best = min(best, found.fun + constant)
    return best


def regions_of(threat: Lp, x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, float]]:
    low, high, eps = threat.bounds[0] - x, threat.bounds[1] - x, float(threat.eps)
    if threat.norm == "linf":
        return [(np.maximum(low, -eps), np.minimum(high, eps), 1e3)]
    if threat.norm == "l1":
        return [(low, high, eps)]
    chosen = itertools.combinations(range(len(x)), int(eps))
    masks = [np.isin(np.arange(len(x)), places) for places in chosen]
    return [(np.where(mask, low, 0.0), np.where(mask, high, 0.0), 1e3) for mask in masks]


THREATS = [Lp("linf", 0.3), Lp("linf", 0.7, (-1.0, 1.0)), Lp("l1", 0.5), Lp("l1", 1.2, (-2.0, 1.0)), Lp("l0", 1)]
THREATS += [Lp("l0", 2, (-1.0, 1.0)), Lp("l0", 2, per="coordinate")]


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize(
    ("sizes", "slope"), [((3, 5, 3), 0.0), ((3, 3, 2, 2), 0.0), ((3, 4, 3), 0.3), ((3, 4, 3), 1.7)]
)
def test_minimum_equals_the_best_of_all_activation_patterns(sizes, slope, threat):
    activation = nn.ReLU() if slope == 0 else nn.LeakyReLU(slope)
    net = layered(sizes, activation, seed=len(sizes) + int(10 * slope))
    x = torch.tensor([[0.9, 0.2, 0.55]], dtype=torch.float64)
    C = torch.tensor([[1.0, -1.0, 0.0], [0.0, -1.0, 0.5]], dtype=torch.float64)[:, : sizes[-1]]
    lower, upper = exact_margins(net, x.reshape(1, 1, 1, 3), threat, C)
    for s, c in enumerate(C.numpy()):
        best = by_patterns(net, slope, regions_of(threat, x[0].numpy()), x[0].numpy(), c)
        assert lower[0, s].item() == pytest.approx(best, abs=1e-6)
        assert upper[0, s].item() == pytest.approx(best, abs=1e-6)
        assert lower[0, s] <= best + 1e-9


class Joined(nn.Module):
    """Two branches and a shortcut of the input that meet in a sum, a difference and a concatenation; max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, (1, 2), padding=(0, 1))
        self.norm = nn.BatchNorm2d(3)
        self.branch = nn.Conv2d(3, 3, (1, 3), padding=(0, 1))
        self.head = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.stem(2 * x - 1)))
        h = F.leaky_relu(h + self.branch(h) - 0.3, 0.1)
        pooled = F.max_pool2d(h, (1, 2), stride=1)
        spread = F.pad(x, (0, 1)) - h.mean((1, 2), keepdim=True) / 2
        return self.head(torch.cat([pooled.flatten(1), spread.flatten(1)], 1))


NETS = {
    "joined": Joined,
    "mlp": lambda: layered((2, 8, 8, 2), nn.ReLU(), 0),
    "max_first": lambda: nn.Sequential(
        nn.Conv2d(1, 6, (1, 2), padding=(0, 1)), nn.MaxPool2d((1, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2)
    ),
    "overlapping": lambda: nn.Sequential(
        nn.Conv2d(1, 4, (1, 1)), nn.MaxPool2d((1, 2), 1, (0, 1)), nn.Flatten(), nn.Linear(12, 3), nn.ReLU(),
        nn.Linear(3, 2),
    ),
}  # fmt: skip


def build(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = NETS[name]().double().eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                module.running_mean.normal_()
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=0.8)
    return net


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_no_point_of_a_grid_is_below_and_the_nearest_is_close(name, norm):
    x, eps = torch.tensor([0.35, 0.8], dtype=torch.float64), 0.3
    line = torch.linspace(-eps, eps, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    grid = grid if norm == "linf" else grid[grid.abs().sum(1) <= eps + 1e-12]
    grid = (x + grid).clamp(0, 1).reshape(-1, 1, 1, 2)
    C = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    for seed in range(3):
        net = build(name, seed)
        lower, upper = exact_margins(net, x.reshape(1, 1, 1, 2), Lp(norm, eps), C)
        with torch.no_grad():
            least = (net(grid) @ C.T).amin(0)
        assert (lower[0] <= least + 1e-9).all()
        assert (least <= upper[0] + 0.05).all()  # half a step of the grid times the slopes of these nets
        assert (upper - lower).amax() < 1e-6


def two_neurons(biases: tuple[float, ...]) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    net[1].weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    net[1].bias.data = torch.tensor(biases[:2], dtype=torch.float64)
    net[3].weight.data = torch.ones(1, 2, dtype=torch.float64)
    net[3].bias.data = torch.tensor(biases[2:], dtype=torch.float64)
    return net


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("biases", "eps", "expected"),
    [
        ((0, 0, 0), 0.1, (0.8, 1.2)),
        ((0, 0, 0), 0.3, (0.4, 1.6)),
        ((0, 0, 0), 0.5, (0.0, 2.0)),
        ((-0.6, -0.1, 0.25), 0.1, (0.35, 0.75)),
        ((-0.6, -0.1, 0.25), 0.2, (0.25, 0.95)),
    ],
)
def test_printed_fixtures(biases, eps, clip, expected):
    x = torch.tensor([0.5, 0.2], dtype=torch.float64).reshape(1, 1, 1, 2)
    threat = Lp("linf", eps, (0.0, 1.0) if clip else (-9.0, 9.0))
    lower, upper = exact_margins(two_neurons(biases), x, threat, torch.tensor([[1.0], [-1.0]]))
    for side in (lower, upper):
        assert side[0].tolist() == pytest.approx([expected[0], -expected[1]], abs=1e-6)


def triangle(net: nn.Sequential, box: tuple[np.ndarray, np.ndarray], hidden: tuple[np.ndarray, np.ndarray], c) -> float:
    """The linear relaxation of a net with one hidden layer, written out."""
    first, last = net[1], net[3]
    W, b = first.weight.detach().numpy(), first.bias.detach().numpy()
    V, v = c @ last.weight.detach().numpy(), c @ last.bias.detach().numpy()
    (low, high), n = hidden, len(b)
    limits = [(0.0, max(u, 0.0)) for u in high]
    rows, ends = [np.concatenate([W, -np.eye(n)], 1)], [-b]  # z <= a
    slope = np.where(high <= 0, 0.0, np.where(low >= 0, 1.0, high / np.maximum(high - low, 1e-30)))
    shift = np.where((low < 0) & (high > 0), -slope * low, 0.0)
    over = slope[:, None] * W
    rows.append(np.concatenate([-over, np.eye(n)], 1))  # a <= slope z + shift
    ends.append(slope * b + shift)
    found = linprog(
        np.concatenate([np.zeros(W.shape[1]), V]),
        A_ub=np.concatenate(rows),
        b_ub=np.concatenate(ends),
        bounds=[*zip(*box, strict=True), *limits],
    )
    return found.fun + v


@pytest.mark.parametrize("slack", [0.0, 0.4])
def test_relaxation_is_the_triangle_over_the_given_bounds(slack):
    C = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    for seed in range(6):
        net = layered((4, 6, 3), nn.ReLU(), seed)
        x = torch.rand(2, 1, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        threat = Lp("linf", 0.4)
        with torch.no_grad():
            lower, upper = bounds(net[:2], threat, x=x)
        hidden = Interval(lower - slack, upper + slack)
        graph = graph_of(net, x)
        place = next(node.inputs[0] for node in graph.nodes if node.op == "relu")
        found = relaxation_bounds(net, x, threat, C, {place: hidden})
        plain = relaxation_bounds(net, x, threat, C)
        exact = exact_margins(net, x, threat, C)[0]
        ibp = bounds(net, threat, C=C, x=x)[0]
        for i in range(2):
            box = tuple(side[i].flatten().numpy() for side in threat.box(x))
            given = hidden.lower[i].numpy(), hidden.upper[i].numpy()
            for s in range(2):
                assert found[i, s].item() == pytest.approx(triangle(net, box, given, C[s].numpy()), abs=1e-6)
        assert (ibp <= plain + 1e-6).all()
        assert (found <= plain + 1e-6).all()
        assert (plain <= exact + 1e-6).all()
        if slack:
            assert (found < plain - 1e-3).any()


def test_relaxed_first_layer_is_exact_for_the_balls():
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 2)).double()
    x, C = torch.rand(1, 1, 1, 5, dtype=torch.float64), torch.tensor([[1.0, -1.0]])
    w = (C.double() @ net[1].weight)[0].detach()
    clean = (C.double() @ net(x).T).item()
    gain = torch.maximum(w * x.flatten(), -w * (1 - x.flatten())).sort(descending=True).values
    for k in (1, 3):
        expected = clean - gain[:k].sum().item()
        assert relaxation_bounds(net, x, Lp("l0", k), C).item() == pytest.approx(expected, abs=1e-6)
        assert exact_margins(net, x, Lp("l0", k + 0.7), C)[0].item() == pytest.approx(expected, abs=1e-6)
    inside = torch.full_like(x, 0.5)
    expected = (C.double() @ net(inside).T).item() - 0.4 * w.abs().max().item()
    assert relaxation_bounds(net, inside, Lp("l1", 0.4), C).item() == pytest.approx(expected, abs=1e-6)


def test_a_pixel_counts_once_and_a_coordinate_each_time():
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 1)).double()
    net[1].weight.data = torch.ones(1, 6, dtype=torch.float64)
    net[1].bias.data.zero_()
    x, C = torch.full((1, 3, 1, 2), 0.5, dtype=torch.float64), torch.eye(1)
    assert exact_margins(net, x, Lp("l0", 1), C)[0].item() == pytest.approx(1.5, abs=1e-6)
    assert exact_margins(net, x, Lp("l0", 1, per="coordinate"), C)[0].item() == pytest.approx(2.5, abs=1e-6)
    assert exact_margins(net, x, Lp("l0", 0.5), C)[0].item() == pytest.approx(3.0, abs=1e-6)


def test_each_sample_has_its_own_budget_and_specification():
    net = layered((3, 5, 3), nn.ReLU(), 4)
    x = torch.rand(2, 1, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    C = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lower, _ = exact_margins(net, x, Lp("linf", torch.tensor([0.1, 0.4])), C)
    for i, eps in enumerate((0.1, 0.4)):
        alone, _ = exact_margins(net, x[i : i + 1], Lp("linf", eps), C[i])
        torch.testing.assert_close(lower[i], alone[0], atol=1e-6, rtol=0)
    point, _ = exact_margins(net, x, Lp("linf", 0.0), torch.eye(3))
    torch.testing.assert_close(point, net(x).detach(), atol=1e-6, rtol=0)


def test_tiny_coefficients_that_the_solver_drops_cost_nothing_of_soundness():
    programme = Programme()
    wide, five = programme.variables(np.zeros(1), np.full(1, 1e6)), programme.variables(np.zeros(5), np.ones(5))
    for i in range(5):  # five >= 9e-4 - 9e-10 * wide, five times: all five can be 0 together
        row = wide.scaled(np.array([-9e-10])) - five.rows(np.array([i]))
        programme.require(row.shifted(np.array([9e-4])))
    total = five.mapped(sparse.csr_array(np.ones((1, 5))))
    assert programme.room < 3e-3  # of 4.5e-3 that the rows would seem to ask for
    assert programme.minimise(total, relaxed=True).lower <= 0.0


def test_bad_input_is_refused():
    net, x, C = layered((3, 4, 2), nn.ReLU(), 0), torch.full((2, 1, 1, 3), 0.5).double(), torch.eye(2)
    with pytest.raises(ValueError, match=r"norm linf, l1, l0.*an l2 ball has no linear rows: take IBP, CROWN"):
        exact_margins(net, x, Lp("l2", 0.1), C)
    with pytest.raises(ValueError, match="with an eps"):
        relaxation_bounds(net, x, Lp("linf", None), C)
    with pytest.raises(ValueError, match=r"C must have shape \(S, 2\) or \(2, S, 2\)"):
        exact_margins(net, x, Lp("linf", 0.1), torch.eye(3))
    with pytest.raises(ValueError, match="divide by 255"):
        exact_margins(net, 255 * x, Lp("linf", 0.1), C)
    with pytest.raises(UnsupportedOperator, match=r"tanh has no exact encoding.*leaky_relu, max_pool2d, relu"):
        exact_margins(layered((3, 4, 2), nn.Tanh(), 0), x, Lp("linf", 0.1), C)
    place = next(node.inputs[0] for node in graph_of(net, x).nodes if node.op == "relu")
    with pytest.raises(ValueError, match="must have 4 entries"):
        wrong = Interval(torch.zeros(2, 3), torch.ones(2, 3))
        relaxation_bounds(net, x, Lp("linf", 0.1), C, {place: wrong})
    net[1].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        exact_margins(net, x, Lp("linf", 0.1), C)
