"""FarFMN: nearest points of linear models, and of nets that are flat around the image, where FMN sees nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import FMN, FarFMN, far_fmn
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp

DUAL = {"linf": 1, "l2": 2, "l1": math.inf}
every_norm = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])


class Flat(nn.Module):
    """Class 1 where the parts of the pixels above 1/2, weighted, add up to 1; flat where all pixels are darker."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        score = (x.flatten(1) - 0.5).clamp_min(0) @ self.weight
        return torch.stack([torch.ones_like(score), score], dim=1)


def dark(count=12):
    return 0.3 * torch.rand(count, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("norm", "allowed"), [("linf", 0.01), ("l2", 0.01), ("l1", 0.15)])
def test_it_finds_the_nearest_point_of_a_linear_model(norm, allowed):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(2, 16, generator=draw(1)))
        net[1].bias.copy_(-net[1].weight.sum(dim=1) / 2)  # the boundary goes through the middle of the images
    x = 0.4 + 0.2 * torch.rand(20, 1, 4, 4, dtype=torch.float64, generator=draw(2))
    y, logits, weight = predict(net, x), net(x).detach(), net[1].weight.detach()
    best = logits.diff(dim=1).abs().flatten() / torch.linalg.vector_norm(weight[1] - weight[0], ord=DUAL[norm])
    room = best <= (0.4 if norm != "l2" else 1.0)  # further away the image bounds bind
    result = FarFMN(steps=200)(net, x, y, Lp(norm, None), generator=draw())
    assert room.sum() >= 8
    assert result.success.all()
    assert (result.distance >= best * (1 - 1e-9)).all()
    assert (result.distance / best)[room].median() <= 1 + allowed


def test_it_sees_across_a_flat_place():
    """Few pixels weigh enough; the least l2 change moves each of them above 1/2 in closed form."""
    weight = torch.zeros(16, dtype=torch.float64)
    weight[:4] = 4.0
    net, x = Flat(weight), dark()
    y, threat = torch.zeros(12, dtype=torch.int64), Lp("l2", None)
    assert not FMN()(net, x, y, threat).success.any()
    result = FarFMN(steps=200)(net, x, y, threat, generator=draw())
    assert result.success.all()
    best = torch.tensor([_least(pixels, 0.25) for pixels in x.flatten(1)[:, :4].tolist()], dtype=torch.float64)
    assert (result.distance >= best * (1 - 1e-9)).all()
    assert (result.distance / best).median() <= 1.02


def test_where_no_noise_fools_the_model_it_climbs_from_noise():
    """The parts above 1/2 must add up to 4.5; noise has 2 or so."""
    net = Flat(torch.full((16,), 1 / 4.5, dtype=torch.float64))
    y, threat = torch.zeros(12, dtype=torch.int64), Lp("l2", None)
    assert predict(net, torch.rand(500, 1, 4, 4, dtype=torch.float64, generator=draw(3))).sum() == 0
    result = FarFMN(restarts=1, draws=1, steps=200)(net, dark(), y, threat, generator=draw())
    assert result.success.all()
    best = torch.tensor([_least(pixels, 4.5) for pixels in dark().flatten(1).tolist()], dtype=torch.float64)
    assert (result.distance >= best * (1 - 1e-9)).all()
    assert (result.distance / best).median() <= 1.1  # which pixels take part is settled on the way


def _least(pixels, parts):
    """The least l2 change of pixels whose parts above 1/2 add up to `parts`, over how many take part."""
    gaps = sorted(0.5 - p for p in pixels)
    found = []
    for count in range(1, len(gaps) + 1):
        level = (parts + sum(gaps[:count])) / count  # each of them moves as far: the multiplier is one for all
        if level >= gaps[count - 1]:
            found.append(math.sqrt(count) * level)
    return min(found)


def test_l0_ends_at_few_pixels():
    weight = torch.zeros(16, dtype=torch.float64)
    weight[:4] = 2.5  # one white pixel adds 1.25
    result = FarFMN(restarts=5)(
        Flat(weight), dark(), torch.zeros(12, dtype=torch.int64), Lp("l0", None), generator=draw()
    )
    assert result.success.all()
    assert result.distance.median() <= 2


@every_norm
def test_further_starts_only_help(norm, net, images):
    y = predict(net, images)
    one, three = (
        FarFMN(restarts=restarts, steps=20)(net, images, y, Lp(norm, None), generator=draw()) for restarts in (1, 3)
    )
    assert (three.distance <= one.distance).all()
    assert (three.distance < one.distance).any()


def test_with_a_budget_a_start_ends_the_search_that_falls_inside(net, images):
    y = predict(net, images)
    nearest = FarFMN(restarts=1)(net, images, y, Lp("l2", None), generator=draw()).distance
    near, far = (
        FarFMN(restarts=2)(net, images, y, Lp("l2", (share * nearest).clamp_max(6)), generator=draw())
        for share in (1.01, 0.5)
    )
    assert near.success.all()
    assert (near.backwards <= 60).all()  # the first start was enough
    assert (far.backwards[~far.success] == 120).all()
    assert far.success.sum() <= 2


def asked(attack, net, x, y, threat):
    """The points of each question about a gradient, whose rows are all of the batch."""
    points = []

    class Spy(Oracle):
        def gradient(self, at, rows, *args, **kwargs):
            points.append(at.clone())
            return super().gradient(at, rows, *args, **kwargs)

    with Spy(net, x, Untargeted(y), threat) as oracle:
        attack.run(oracle, x, oracle.goal, threat, Streams.from_generator(None, torch.arange(len(x))))
    return points


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_a_search_begins_where_the_halved_way_from_noise_meets_the_boundary(norm, monkeypatch):
    """On a way that only gains there is one such place: the least of 256 shares that fools, by brute force."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    x, length = (torch.rand(12, 1, 4, 4, dtype=torch.float64, generator=draw(seed)) for seed in (2, 3))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(2, 16, generator=draw(1)))
        net[1].bias.copy_(-net[1].weight.sum(dim=1) / 2)
    y = predict(net, x)
    gains = (net[1].weight[1 - y] - net[1].weight[y]).detach().sign().reshape(x.shape)
    far = (x + gains * length).clamp(0, 1)
    rows = (predict(net, far) != y).nonzero().flatten()
    x, y, far = x[rows], y[rows], far[rows]
    monkeypatch.setattr(far_fmn, "random_start", lambda oracle, purse, rows, *rest: (rows, far[rows]))
    first = asked(FarFMN(restarts=1), net, x, y, Lp(norm, None))[0]
    assert len(rows) >= 4
    for i in range(len(rows)):
        change = far[i : i + 1] - x[i : i + 1]
        ways = [k / 256 * change for k in range(1, 257)]
        if norm == "linf":
            ways = [change.clamp(-k / 256 * change.abs().max(), k / 256 * change.abs().max()) for k in range(1, 257)]
        least = next(way for way in ways if predict(net, x[i : i + 1] + way) != y[i])
        assert torch.allclose(first[i], x[i] + least[0], rtol=0, atol=1e-9)


def test_coarser_noise_is_tried_where_fine_noise_does_not_fool():
    """Only the mean counts, which fine noise hardly moves."""

    def model(x):
        score = (x.mean(dim=(1, 2, 3)) - 0.5).abs() - 0.2
        return torch.stack([torch.zeros_like(score), score], dim=1)

    x, y = torch.full((12, 1, 6, 6), 0.5, dtype=torch.float64), torch.zeros(12, dtype=torch.int64)
    fooled = [
        int((predict(model, asked(FarFMN(restarts=1, draws=draws), model, x, y, Lp("l2", None))[0]) != y).sum())
        for draws in (1, 10)
    ]
    assert fooled[0] == 0
    assert fooled[1] >= 9


def test_no_budget_binds_on_the_way_in(net, images):
    y, eps = predict(net, images), torch.linspace(0.01, 0.02, 12, dtype=torch.float64)
    points = asked(FarFMN(restarts=1), net, images, y, Lp("l2", eps))
    for step in (0, 1):
        assert ((points[step] - images).flatten(1).norm(dim=1) > 2 * eps).all()


@pytest.mark.parametrize("bounds", [(0.0, 0.1), (0.1, 0.4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_radii_stay_within_bounds_that_float32_cannot_hold(bounds, dtype):
    low, high = bounds
    x = low + (high - low) * torch.rand(6, 1, 4, 4, generator=draw(2)).round().to(dtype)

    def stubborn(x):
        return torch.stack([x.flatten(1).sum(dim=1) + 9, x.flatten(1)[:, 0]], dim=1)

    result = FarFMN(restarts=1)(stubborn, x, torch.zeros(6, dtype=torch.int64), Lp("linf", None, bounds=bounds))
    assert not result.success.any()


def test_units_of_the_images_do_not_matter(net, images):
    y = predict(net, images)
    unit = FarFMN(restarts=1)(net, images, y, Lp("l2", None), generator=draw())
    scaled = nn.Sequential(Bright(), net)
    wide = FarFMN(restarts=1)(scaled, 255 * images, y, Lp("l2", None, bounds=(0, 255)), generator=draw())
    assert torch.allclose(wide.distance, 255 * unit.distance, rtol=1e-6)


class Bright(nn.Module):
    """Images in [0, 255]."""

    def forward(self, x):
        return x / 255


def test_a_target_is_reached(net, images):
    target = (predict(net, images) + 1) % 4
    result = FarFMN()(net, images, Targeted(target), Lp("l2", None), generator=draw())
    assert result.success.sum() >= 8
    assert torch.equal(predict(net, result.x_adv) == target, result.success)


def test_bad_hyper_parameters_say_what_is_wrong():
    for options, message in [
        ({"restarts": 0}, "restarts must be a whole number"),
        ({"draws": 0}, "draws must be a whole number"),
        ({"halvings": 1.5}, "halvings must be a whole number"),
        ({"gamma_init": 1.0}, "gamma_init must be between 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            FarFMN(**options)
