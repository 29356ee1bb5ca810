"""Partial information and label-only: what they see, how the ball shrinks, and what they find."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import Gallery, NESEstimator, NESLabelOnly, NESPartialInformation
from robustbench_lite.attacks._nes_shrink import Shrink
from robustbench_lite.attacks._purse import Purse
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.losses import cross_entropy
from robustbench_lite.core.models import predict
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp


def linear(dims=36, seed=0):
    """A two-class linear model whose margin at the grey image is -0.5, and its weights."""
    w = torch.randn(dims, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def model(x):
        score = 4 * ((x.flatten(1) - 0.5) @ w - 0.5)
        return torch.stack([torch.zeros_like(score), score], dim=1)

    return model, w


def grey(count):
    return torch.full((count, 1, 6, 6), 0.5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("attack", "queries", "slack"),
    [(NESPartialInformation(), 20000, 1.4), (NESLabelOnly(m=20, u=0.01, sigma=0.01, samples=50), 60000, 1.7)],
    ids=["partial", "label"],
)
def test_a_linear_model_falls_beyond_its_distance_and_not_within(attack, queries, slack):
    model, w = linear()
    x, y = grey(3), torch.zeros(3, dtype=torch.int64)
    distance = 0.5 / float(w.abs().sum())
    wide = attack(model, x, y, Lp("linf", distance * slack), max_queries=queries)
    assert wide.success.all()
    assert wide.first_success.max() > attack.samples  # bisection alone does not get there
    assert not attack(model, x, y, Lp("linf", distance * 0.999), max_queries=queries // 10).success.any()


@pytest.fixture
def smooth():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 4)).double()


def ask(attack, model, x, target, method):
    """Call `method(oracle, rows, streams)` on an oracle about x; return its answer and the oracle."""
    with Oracle(model, x, Targeted(target), Lp("linf", 0.1), access=attack.access, stop="never") as oracle:
        return method(oracle, torch.arange(len(x)), Streams(5, list(range(len(x))), torch.device("cpu"))), oracle


def test_with_every_class_in_sight_the_estimate_is_that_of_nes(smooth, images):
    target = torch.arange(12) % 4
    attack = NESPartialInformation(k=4, sigma=1e-3)
    (gradient, value), _ = ask(
        attack, smooth, images, target, lambda *a: attack._estimate_part(*a[:2], images, target, a[2])
    )
    with Oracle(smooth, images, Targeted(target), Lp("linf", 0.1), access=Access.SCORES, stop="never") as oracle:
        streams = Streams(5, list(range(12)), torch.device("cpu"))
        expected = NESEstimator(100, 1e-3)(oracle, images, torch.arange(12), cross_entropy, streams)
    assert torch.allclose(gradient, expected, atol=1e-9)
    assert torch.allclose(value, -cross_entropy(smooth(images), Targeted(target)), atol=1e-3)


def test_only_probes_that_show_the_target_enter_the_estimate(smooth, images):
    """Brute force over the probes, at a point on the boundary of the top class."""
    attack, target = NESPartialInformation(k=1, sigma=0.5, samples=40), predict(smooth, images)
    (gradient, value), oracle = ask(
        attack, smooth, images, target, lambda *a: attack._estimate_part(*a[:2], images, target, a[2])
    )
    assert (oracle.forwards == 40).all()
    streams = Streams(5, list(range(12)), torch.device("cpu"))
    halves = [streams.normal(length, 36, dtype=torch.float64) for length in (8, 8, 4)]
    mixed = 0
    for i in range(12):
        directions = torch.cat([torch.cat([half[i], -half[i]]) for half in halves])
        logits = smooth(images[i] + 0.5 * directions.reshape(-1, 1, 6, 6))
        seen = logits.argmax(dim=1) == target[i]
        loss = -logits.log_softmax(dim=1)[seen, target[i]]
        mixed += 0 < int(seen.sum()) < 40
        expected = -((loss - loss.mean()).unsqueeze(1) * directions[seen]).mean(dim=0) / 0.5
        assert torch.allclose(gradient[i].flatten(), expected.detach(), atol=1e-9)
        assert value[i] == pytest.approx(loss.mean().item())
    assert mixed > 3


@pytest.mark.parametrize("k", [1, 3])
def test_the_label_only_loss_counts_ranks(k, smooth, images):
    attack, target = NESLabelOnly(k=k, m=30, u=0.4), torch.arange(12) % 4
    probes = torch.stack([images, 1 - images], dim=1)
    loss, oracle = ask(attack, smooth, images, target, lambda *a: attack.losses(a[0], probes, a[1], target, a[2]))
    assert oracle.forwards.tolist() == [60] * 12
    streams = Streams(5, list(range(12)), torch.device("cpu"))
    for j in range(2):
        around = probes[:, j].unsqueeze(1) + 0.4 * (2 * streams.uniform(30, 1, 6, 6, dtype=torch.float64) - 1)
        order = smooth(around.flatten(0, 1)).argsort(dim=1, descending=True).reshape(12, 30, 4)
        rank = (order == target.reshape(-1, 1, 1)).double().argmax(dim=2)
        expected = 1 - ((k - rank).clamp_min(0).double() / k).mean(dim=1)
        assert torch.allclose(loss[:, j], expected)
    assert 0.1 < loss.mean() < 0.95


def shrink(shows, eps=0.8, goal=0.05, value=0.0, rate=0.01, least=0.01, conservative=2.0):
    """Run one search whose target is seen where `shows(radius, length)`; return the state and the tries."""
    tries = []
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    number = lambda v: torch.tensor([v], dtype=torch.float64)  # noqa: E731
    state = {
        "points": x.clone(), "target": torch.tensor([1]), "value": number(value), "eps": number(eps),
        "goal_eps": number(goal), "cut": number(0.5), "rate": number(rate), "least": number(least),
        "window": torch.ones(1, 3, dtype=torch.float64),
    }  # fmt: skip
    threat = Lp("linf", goal)

    def model(images):
        return torch.zeros(len(images), 2).to(images)

    def shown(oracle, points, rows, target, candidate):
        tries.append((float(points), candidate))
        return torch.tensor([shows(float(points))])

    with Oracle(model, x, Untargeted(torch.tensor([0])), threat, access=Access.TOPK, stop="never") as oracle:
        # The step is 1 a full length long: the point tried is min(share, radius).
        after = Shrink(0.2, conservative)(
            oracle, Purse(oracle, None), threat, torch.tensor([0]), state, torch.ones_like(x), shown
        )
    return after, tries


def test_an_accepted_cut_is_taken_over_conservative_and_asked_again():
    after, tries = shrink(lambda point: True)
    assert [round(point, 6) for point, _ in tries] == [0.3]
    assert float(after["eps"]) == pytest.approx(0.8 - 0.5 / 2)
    assert float(after["cut"]) == 0.5
    assert after["window"].isnan().all()
    assert float(shrink(lambda point: True, conservative=4.0)[0]["eps"]) == pytest.approx(0.8 - 0.5 / 4)


def test_a_refused_cut_is_halved_after_the_steps():
    after, tries = shrink(lambda point: point > 0.65, rate=0.04)
    # Steps of 1, 1/2 and 1/4 of the length in each ball: radius 0.3, then 0.55, then 0.675.
    assert [round(point, 6) for point, _ in tries] == [0.3, 0.3, 0.25, 0.55, 0.5, 0.25, 0.675]
    assert float(after["eps"]) == pytest.approx(0.8 - 0.125 / 2)
    assert float(after["cut"]) == pytest.approx(0.125)
    assert not any(candidate for _, candidate in tries)
    narrow, _ = shrink(lambda point: point > 0.7)  # 0.0625 is accepted, and 0.1 asked next
    assert float(narrow["cut"]) == pytest.approx(0.1)


def test_where_nothing_does_the_sample_stays():
    after, tries = shrink(lambda point: False)
    radii = [point for point, _ in tries]
    assert radii == pytest.approx([0.8 - 0.5 / 2**i for i in range(8)] + [0.8], abs=1e-9)  # 0.5 / 2^8 is below 0.002
    assert float(after["eps"]) == 0.8
    assert (after["points"] == 0).all()
    assert not after["window"].isnan().any()


def test_the_ball_shrinks_only_while_the_loss_is_low_and_only_points_in_the_threat_are_candidates():
    after, tries = shrink(lambda point: True, value=0.3)
    assert [round(point, 6) for point, _ in tries] == [0.8]
    assert float(after["eps"]) == 0.8
    after, tries = shrink(lambda point: True, eps=0.3)
    assert tries == [(pytest.approx(0.05), True)]
    assert float(after["eps"]) == pytest.approx(0.05)


@pytest.mark.parametrize(
    "attack", [NESPartialInformation(samples=40), NESLabelOnly(samples=20, m=10)], ids=["partial", "label"]
)
@pytest.mark.parametrize("capacity", [1, 30])
def test_memory_bounds_the_probes_and_changes_nothing(attack, capacity, smooth, images, monkeypatch):
    with torch.no_grad():
        smooth[3].weight *= 20
    y, threat, asked = predict(smooth, images), Lp("linf", 0.05), []
    expected = attack(smooth, images, y, threat, max_queries=500)
    for name in ("topk", "labels"):
        question = getattr(Oracle, name)

        def spy(self, points, rows, *args, question=question, candidate=True):
            asked.append(0 if candidate else len(points))
            return question(self, points, rows, *args, candidate=candidate)

        monkeypatch.setattr(Oracle, name, spy)
    monkeypatch.setattr(Oracle, "capacity", capacity)
    frugal = attack(smooth, images, y, threat, max_queries=500)
    assert 0 < max(asked) <= max(capacity, 16)
    assert torch.allclose(frugal.x_adv, expected.x_adv, atol=1e-9)
    assert torch.equal(frugal.forwards, expected.forwards)
    assert expected.forwards.max() > 100


def test_label_only_needs_no_more_than_labels():
    assert NESLabelOnly().access == Access.LABEL
    assert NESLabelOnly(k=2).access == NESPartialInformation().access == Access.TOPK


def test_no_image_of_a_gallery_is_asked_about_twice():
    """A model that never agrees is shown each image of a wanted class once for each sample, whatever the draws."""
    pictures, seen = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)), []

    def stubborn(x):
        seen.extend(x.flatten(1).tolist())
        return torch.tensor([1.0, 0.0]).repeat(len(x), 1)

    x, y = torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    with Oracle(stubborn, x, Untargeted(y), Lp("linf", 0.1), access=Access.LABEL) as oracle:
        gallery = Gallery(pictures, torch.tensor([1, 1, 0, 1, 1, 0]))
        rows, _ = gallery.start(oracle, Purse(oracle, None), Streams(0, [0, 1], torch.device("cpu")), 50)
    assert len(rows) == 0
    assert oracle.forwards.tolist() == [4, 4]
    assert sorted(seen) == sorted(2 * pictures[[0, 1, 3, 4]].flatten(1).tolist())


def test_a_gallery_gives_starts_of_the_wanted_class(smooth):
    g = torch.Generator().manual_seed(4)
    x, pictures = (torch.rand(n, 1, 6, 6, dtype=torch.float64, generator=g) for n in (8, 60))
    y, labels = predict(smooth, x), predict(smooth, pictures)
    gallery = Gallery(pictures, labels)
    target = (y + 1) % 4
    for goal in (Targeted(target), Untargeted(y)):
        with Oracle(smooth, x, goal, Lp("linf", 0.1), access=Access.LABEL) as oracle:
            rows, far = gallery.start(oracle, Purse(oracle, None), Streams(0, list(range(8)), torch.device("cpu")), 5)
            wanted = [
                bool(goal.take(rows[i : i + 1]).achieved(predict(smooth, far[i : i + 1]))) for i in range(len(rows))
            ]
            assert all(wanted)
            present = torch.isin(target, labels) if isinstance(goal, Targeted) else torch.ones(8, dtype=torch.bool)
            assert rows.tolist() == present.nonzero().flatten().tolist()
            assert oracle.forwards.tolist() == present.long().tolist()
    with torch.no_grad():
        smooth[3].weight *= 20  # the ball shrinks only for a target that is probable
    near = NESPartialInformation(gallery=gallery)(smooth, x, predict(smooth, x), Lp("linf", 0.4), max_queries=1500)
    assert near.success.all()
    with pytest.raises(ValueError, match="images must have shape"):
        NESLabelOnly(gallery=Gallery(pictures[:, :, :5], labels))(smooth, x, y, Lp("linf", 0.3))
    assert repr(gallery) == "Gallery(60 images)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NESPartialInformation(k=0), "k must be a whole number"),
        (lambda: NESPartialInformation(samples=5), "even number of probes"),
        (lambda: NESPartialInformation(conservative=0.5), "conservative must be at least 1"),
        (lambda: NESPartialInformation(threshold=0), "threshold must be > 0"),
        (lambda: NESLabelOnly(m=0), "m must be a whole number"),
        (lambda: NESLabelOnly(u=0), "u must be > 0"),
        (lambda: NESLabelOnly(draws=0), "draws must be a whole number"),
        (lambda: Gallery(torch.zeros(3, 1, 2, 2), torch.zeros(2)), "a gallery has images"),
        (lambda: Gallery(torch.zeros(0, 1, 2, 2), torch.zeros(0)), "at least one image"),
    ],
)
def test_settings_out_of_range_say_so(build, message):
    with pytest.raises(ValueError, match=message):
        build()
