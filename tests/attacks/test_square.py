"""The Square attack: its schedule, where its candidates live, and what it finds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import RandomNoise, Square
from robustbench_lite.attacks._square_moves import MOVES, LinfMoves, _corners, _some_channels, _window, bump_pair
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import margin
from robustbench_lite.core.models import predict
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp


def streams(count):
    return Streams.from_generator(None, torch.arange(count))


class Recorder(nn.Module):
    """A net that remembers what it is asked."""

    def __init__(self, net):
        super().__init__()
        self.net, self.asked = net, []

    def forward(self, x):
        self.asked.append(x.clone())
        return self.net(x)


def unbreakable(x):
    """Class 0, always, by a margin that depends on the input."""
    margin = 100 + x.flatten(1).mean(dim=1, keepdim=True)
    return torch.cat([margin, -margin], dim=1)


def test_the_published_schedule_for_10_000_queries_and_its_rescaling():
    """Window shares of the paper's p schedule: p, p/2, ... up to p/512."""
    attack = Square(queries=10_000, p_init=0.8)
    ends = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    for halvings, end in enumerate(ends):
        assert attack.share(end) == 0.8 / 2**halvings
        assert attack.share(end + 1) == 0.8 / 2 ** (halvings + 1)
    assert attack.share(9999) == 0.8 / 512
    assert [Square(queries=1000).share(step) for step in (1, 2, 20, 800, 801)] == [
        0.8, 0.4, 0.2, 0.8 / 256, 0.8 / 512,
    ]  # fmt: skip


def test_window_sides_hold_the_share_and_fit_the_image():
    x = torch.rand(2, 3, 28, 12)
    linf, l2 = (MOVES[norm](x, Lp(norm, 0.1), streams(2)) for norm in ("linf", "l2"))
    assert [linf.side(p) for p in (0.8, 0.1, 0.001)] == [12, 6, 1]
    assert [l2.side(p) for p in (0.8, 0.1, 0.001)] == [12, 7, 3]  # odd, at least 3, where the image allows


def test_windows_are_squares_at_every_place_that_fits():
    n = 4000
    draws = streams(n).uniform(2)
    images = torch.zeros(n, 2, 5, 7)
    window = _window(images, 3, _corners(images, 3, draws[:, 0], draws[:, 1]))
    rows, columns = window // 7, window % 7
    assert window.shape == (n, 2, 9)
    assert (rows.amax(2) - rows.amin(2) == 2).all() and (columns.amax(2) - columns.amin(2) == 2).all()
    corners = window[:, 0, 0].bincount(minlength=35)
    fits = torch.zeros(5, 7, dtype=torch.bool)
    fits[:3, :5] = True
    assert torch.equal(corners > 0, fits.flatten())
    assert (corners[corners > 0] / n - 1 / 15).abs().max() < 0.02
    most = torch.full((1,), 1 - 2**-24)
    assert _corners(images, 3, most, most).tolist() == [2 * 7 + 4]


def test_a_plan_for_several_sides_places_each_window_as_it_would_alone():
    images, draws = torch.zeros(50, 1, 6, 9), streams(50).uniform(3, 2)
    sides = torch.tensor([[1], [3], [6]])
    planned = _corners(images, sides, draws[..., 0].T, draws[..., 1].T)
    for step, side in enumerate([1, 3, 6]):
        assert torch.equal(planned[step], _corners(images, side, draws[:, step, 0], draws[:, step, 1]))


def test_signs_that_change_nothing_are_replaced_by_a_uniform_other_choice():
    flips = _some_channels(streams(7000).uniform(1)[:, 0], 3).squeeze(2)
    codes = (flips * torch.tensor([1, 2, 4])).sum(dim=1).bincount(minlength=8)
    assert codes[0] == 0
    assert (codes[1:] / 7000 - 1 / 7).abs().max() < 0.02
    assert _some_channels(torch.tensor([0.0, 0.999999]), 40).any(dim=1).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_linf_moves_stay_on_the_corners_and_always_change_something(channels):
    x = torch.rand(20, channels, 6, 9, dtype=torch.float64)
    threat = Lp("linf", 0.2)
    moves = LinfMoves(x, threat, streams(20))
    up = moves.points > x
    assert torch.equal(up, up[:, :, :1].expand_as(up)), "vertical stripes"
    source = streams(20)
    for step in range(30):
        before = moves.points.clone()
        moves.plan([1 + step % 5], source.uniform(1, moves.draws))
        after = moves.change(0).clone()
        assert (after != before).flatten(1).any(dim=1).all()
        low, high = (x - 0.2).clamp(0, 1), (x + 0.2).clamp(0, 1)
        assert torch.minimum((after - low).abs(), (after - high).abs()).max() < 1e-12
        better = torch.arange(20) % 2 == step % 2
        moves.settle(better)
        assert torch.equal(moves.points[better], after[better])
        assert torch.equal(moves.points[~better], before[~better])


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("order", [2, 1])
def test_bump_pairs_have_norm_one_and_two_signs(side, order):
    pair = bump_pair(side, torch.float64, torch.device("cpu"), order)
    assert pair.shape == (side, side)
    assert abs(pair.norm(p=order).item() - 1) < 1e-12
    assert side == 1 or torch.allclose(pair[: side // 2].norm(p=order), pair[side // 2 :].norm(p=order))
    assert (pair[: side // 2] > 0).all() and (pair[side // 2 :] < 0).all()


@pytest.mark.parametrize(("order", "power"), [(2, 2), (1, 4)])
def test_a_bump_is_the_sum_of_the_papers_squares(order, power):
    """eta_{r,s} = sum_{k=0}^{M} 1 / (n + 1 - k)^2, with M = n - (rings from the centre); in l1 the fourth power."""
    lower = -bump_pair(9, torch.float64, torch.device("cpu"), order)[4:]  # 5 x 9: n = 4, centre (2, 4)
    expected = torch.tensor(
        [
            [sum(1 / (4 + 1 - k) ** power for k in range(4 - max(abs(r - 2), abs(s - 4)) + 1)) for s in range(9)]
            for r in range(5)
        ],
        dtype=torch.float64,
    )
    assert torch.allclose(lower / lower.norm(), expected / expected.norm(), atol=1e-12)


def test_l2_candidates_use_the_whole_radius_inside_the_threat():
    x = torch.rand(8, 3, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:4] = 0.5  # far from the bounds
    net = Recorder(unbreakable)
    threat = Lp("l2", 0.6)
    Square(queries=60)(net, x, torch.zeros(8, dtype=torch.int64), threat)
    assert len(net.asked) == 61
    for candidates in net.asked[1:]:
        assert threat.contains(candidates, x).all()
        length = (candidates - x).flatten(1).norm(dim=1)
        assert (length[:4] - 0.6).abs().max() < 1e-6
        assert length.min() > 0.58


def test_l2_moves_mass_within_two_windows_and_channels():
    """Far from the bounds nothing is unused: entries outside both windows keep their values."""
    x = torch.full((6, 2, 9, 9), 0.5, dtype=torch.float64)
    moves = MOVES["l2"](x, Lp("l2", 0.3), streams(6))
    before = moves.points.clone()
    draws = streams(6).uniform(moves.draws)
    moves.plan([3], draws.unsqueeze(1))
    after = moves.change(0)
    first, second = (_window(x, 3, _corners(x, 3, draws[:, i], draws[:, i + 1])) for i in (0, 2))
    outside = torch.ones(6, 2, 81, dtype=torch.bool).scatter(2, first, False).scatter(2, second, False)
    assert torch.allclose(after.flatten(2)[outside], before.flatten(2)[outside], atol=1e-6)
    for channel in range(2):
        lengths = [(p - x)[:, channel].flatten(1).norm(dim=1) for p in (before, after)]
        assert torch.allclose(*lengths, atol=1e-6)
    emptied = (after - x).flatten(2).gather(2, second)
    in_first = (second.unsqueeze(3) == first.unsqueeze(2)).any(dim=3)
    assert emptied[~in_first].abs().max() < 1e-12


def test_l1_candidates_use_the_radius_inside_the_threat_and_grow_sparser():
    x = torch.rand(8, 3, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:4] = 0.5  # far from the bounds
    net = Recorder(unbreakable)
    threat = Lp("l1", 4.0)
    Square(queries=60)(net, x, torch.zeros(8, dtype=torch.int64), threat)
    for candidates in net.asked[1:]:
        assert threat.contains(candidates, x).all()
        assert ((candidates - x).flatten(1).abs().sum(dim=1)[:4] - 4.0).abs().max() < 1e-6
    moved = [(candidates != x).flatten(1).sum(dim=1)[:4] for candidates in (net.asked[1], net.asked[-1])]
    assert (moved[1] < moved[0]).all()


def test_an_l1_window_receives_its_mass_once_a_channel_and_the_rest_pays():
    x = torch.full((6, 2, 9, 9), 0.5, dtype=torch.float64)
    threat = Lp("l1", 3.0)
    moves = MOVES["l1"](x, threat, streams(6))
    before = (moves.points - x).flatten(2)
    draws = streams(6).uniform(moves.draws)
    moves.plan([3], draws.unsqueeze(1))
    after = (moves.change(0) - x).flatten(2)
    first, second = (_window(x, 3, _corners(x, 3, draws[:, i], draws[:, i + 1])) for i in (0, 2))
    outside = torch.ones(6, 2, 81, dtype=torch.bool).scatter(2, first, False).scatter(2, second, False)
    shrunk = before.abs() - after.abs()
    taken = torch.stack([shrunk[i][outside[i] & (after[i] != 0)].mean() for i in range(6)])
    for i in range(6):  # a soft threshold: all that stay lose the same
        assert torch.allclose(shrunk[i][outside[i] & (after[i] != 0)], taken[i], atol=1e-6)
    assert taken.max() > 1e-4 and taken.min() > -1e-6
    assert torch.allclose(after.abs().sum(dim=(1, 2)), torch.tensor(3.0, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.12), ("l2", 0.6), ("l1", 2.5)])
@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_it_beats_random_noise_and_equals_its_samples_one_by_one(norm, eps, loss, net, images):
    x = torch.cat([images, images.flip(3), images.flip(2)])
    y, threat = predict(net, x), Lp(norm, eps)
    square = Square(queries=100, loss=loss)(net, x, y, threat)
    noise = RandomNoise(draws=100)(net, x, y, threat)
    assert square.success.sum() > noise.success.sum() + 3
    for i in range(0, 36, 9):
        alone = Square(queries=100, loss=loss)(net, x[i : i + 1], y[i : i + 1], threat, indices=torch.tensor([i]))
        assert torch.equal(alone.x_adv[0], square.x_adv[i])
        assert alone.forwards[0] == square.forwards[i]


@pytest.mark.parametrize("budget", [None, 20])
def test_who_stands_keeps_the_best_of_all_that_was_asked_about_it(budget):
    """Failures are noted late: when the search ends, or when a sample can no longer pay."""
    x = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    recorder = Recorder(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval())
    with torch.no_grad():
        recorder.net[1].bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    y = torch.zeros(4, dtype=torch.int64)
    result = Square(queries=40)(recorder, x, y, Lp("linf", 0.05), max_queries=budget)
    assert not result.success.any()
    assert (result.forwards == (budget or 41)).all()
    lead = lambda points: margin(recorder.net(points), Untargeted(y))  # noqa: E731
    with torch.no_grad():
        asked = torch.stack([lead(points) for points in recorder.asked[1:]])
        assert torch.equal(lead(result.x_adv), asked.amax(dim=0))
    assert (result.x_adv != x).flatten(1).any(dim=1).all()


def test_restarts_and_targets(net, images):
    y = predict(net, images)
    once, twice = (Square(queries=20, restarts=r)(net, images, y, Lp("linf", 0.1)) for r in (1, 2))
    assert (twice.success | ~once.success).all()
    assert set(once.forwards[~once.success].tolist()) == {21}
    assert set(twice.forwards[~twice.success].tolist()) == {41}
    goal = Targeted((y + 1) % 4)
    for loss in ("margin", "ce"):
        result = Square(queries=300, loss=loss)(net, images, goal, Lp("linf", 0.4))
        assert result.success.sum() > 6
        assert torch.equal(predict(net, result.x_adv) == goal.labels, result.success)


def test_hyper_parameters_are_checked():
    for options, message in [
        ({"queries": 0}, "queries must be a whole number"),
        ({"restarts": 1.5}, "restarts must be a whole number"),
        ({"p_init": 0}, "p_init is a share"),
        ({"loss": "dlr"}, "'margin' or 'ce'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Square(**options)
    assert not Square().supports(Lp("linf", None))
    assert not Square().supports(Lp("l0", 3))
