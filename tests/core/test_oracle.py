from __future__ import annotations

import pytest
import torch
from torch import nn

from robustbench_lite.core.goals import Untargeted
from robustbench_lite.core.losses import cross_entropy, margin
from robustbench_lite.core.models import ABSTAIN, frozen, labels_of, predict
from robustbench_lite.core.oracle import Access, AccessDeniedError, Oracle, OutOfBudgetError
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp

THREAT = Lp("linf", 0.2)


def rows(*values):
    return torch.tensor(values, dtype=torch.int64)


def oracle(net, images, **options):
    y = predict(net, images)
    return Oracle(net, images, Untargeted(y), THREAT, **options)


def test_gradient_matches_finite_differences(net, images):
    o = oracle(net, images)
    with o:
        _, slope = o.gradient(images[:2], rows(0, 1), cross_entropy)
        step = 1e-6
        for pixel in (0, 17, 35):
            moved = images[:2].clone()
            moved.reshape(2, -1)[:, pixel] += step
            up, _ = o.gradient(moved, rows(0, 1), cross_entropy)
            down, _ = o.gradient(images[:2], rows(0, 1), cross_entropy)
            assert torch.allclose((up - down) / step, slope.reshape(2, -1)[:, pixel], atol=1e-4)


def test_gradient_of_a_parametric_threat_is_that_of_its_parameters(net, images):
    threat = RotationTranslation()
    point = threat.origin(images) + 0.3
    with Oracle(net, images, Untargeted(predict(net, images)), threat) as o:
        _, slope = o.gradient(point, torch.arange(12), margin)
    leaf = point.clone().requires_grad_()
    (expected,) = torch.autograd.grad(margin(net(threat.apply(images, leaf)), o.goal).sum(), leaf)
    assert torch.allclose(slope, expected)


def test_passes_are_counted_for_each_sample(net, images):
    with oracle(net, images) as o:
        o.gradient(images[[1, 3]], rows(1, 3), margin)
        o.scores(images[[3]], rows(3))
        o.labels(images[[4]], rows(4))
    assert o.forwards.tolist() == [0, 1, 0, 2, 1] + [0] * 7
    assert o.backwards.tolist() == [0, 1, 0, 1] + [0] * 8


def test_access_levels_refuse_what_lies_above(net, images):
    one = (images[:1], rows(0))
    with oracle(net, images, access=Access.LABEL) as o:
        o.labels(*one)
        o.judge(*one)
        with pytest.raises(AccessDeniedError, match="TOPK access, but the attack declared LABEL"):
            o.topk(*one, 1)
        with pytest.raises(AccessDeniedError):
            o.scores(*one)
    with oracle(net, images, access=Access.SCORES) as o:
        values, classes = o.topk(*one, 2)
        assert torch.equal(classes[:, 0], predict(net, images[:1]))
        assert values.sum() <= 1
        with pytest.raises(AccessDeniedError):
            o.gradient(*one, margin)


def test_budget_is_never_exceeded_and_nothing_is_asked_beyond_it(net, images):
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    with oracle(net, images, max_queries=2) as o:
        calls.clear()
        o.scores(images[:2], rows(0, 1))
        o.scores(images[:1], rows(0))
        assert o.standing().tolist() == list(range(1, 12))
        assert o.still(rows(0, 1, 2), queries=2).tolist() == [2]
        with pytest.raises(OutOfBudgetError, match=r"samples \[0\]"):
            o.scores(images[:2], rows(0, 1))
    assert len(calls) == 2
    assert o.forwards.max() == 2


def test_a_row_that_comes_twice_pays_twice(net, images):
    probes = images[[0, 0, 1]]
    with oracle(net, images, max_queries=2) as o:
        o.scores(probes, rows(0, 0, 1), candidate=False)
        assert o.forwards[:3].tolist() == [2, 1, 0]
        with pytest.raises(OutOfBudgetError, match=r"samples \[1\]"):
            o.scores(probes[:2], rows(1, 1), candidate=False)
    assert o.forwards[:3].tolist() == [2, 1, 0]


def test_chunks_change_nothing_but_the_size_of_a_batch(net, images):
    sizes = []
    net.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    everything = torch.arange(12)
    with oracle(net, images) as whole, oracle(net, images, memory_budget=60_000) as parts:
        for o in (whole, parts):
            o.judge_clean()  # the first pass tells what an image takes
        sizes.clear()
        a, b = whole.gradient(images, everything, margin), parts.gradient(images, everything, margin)
        assert sizes[0] == sum(sizes[1:]) == 12
        assert 1 < len(sizes[1:]) < 12
        sizes.clear()
        assert torch.allclose(whole.scores(images, everything), parts.scores(images, everything))
        assert max(sizes[1:]) <= parts.capacity < whole.capacity
    assert torch.allclose(a[0], b[0])
    assert torch.allclose(a[1], b[1])
    assert torch.equal(whole.forwards, parts.forwards)


def test_curvature_is_the_hessian_of_a_known_function(images):
    hessian = torch.randn(36, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = hessian + hessian.T

    def quadratic(x):
        flat = x.flatten(1)
        score = 0.5 * (flat @ hessian * flat).sum(dim=1)
        return torch.stack([score, torch.zeros_like(score)], dim=1)

    directions = torch.rand_like(images)
    with Oracle(quadratic, images, Untargeted(torch.ones(12, dtype=torch.int64)), THREAT) as o:
        product = o.curvature(images, torch.arange(12), margin, directions)
    assert torch.allclose(product.flatten(1), directions.flatten(1) @ hessian)
    assert (o.forwards == 1).all()
    assert (o.backwards == 2).all()


def test_a_transform_acts_between_the_probe_and_the_model(net, images):
    shift = torch.rand_like(images)
    with oracle(net, images) as o:
        everything = torch.arange(12)
        moved = o.gradient(images, everything, margin, candidate=False, transform=lambda x, part: 0.5 * x + shift[part])
        plain = o.gradient(0.5 * images + shift, everything, margin, candidate=False)
    assert torch.allclose(moved[0], plain[0])
    assert torch.allclose(moved[1], 0.5 * plain[1])


def test_memory_that_runs_out_halves_the_chunk(images):
    class Greedy(nn.Module):
        def forward(self, x):
            if len(x) > 3:
                raise torch.OutOfMemoryError("too large")
            return torch.stack([x.mean(dim=(1, 2, 3)), 1 - x.mean(dim=(1, 2, 3))], dim=1)

    with Oracle(Greedy(), images, Untargeted(torch.zeros(12, dtype=torch.int64)), THREAT) as o:
        assert o.scores(images, torch.arange(12)).shape == (12, 2)
    assert (o.forwards == 1).all()


def test_success_is_the_deployed_models_answer_not_the_views(net, images):
    class Shifted(nn.Module):
        cost = 3

        def forward(self, x):
            return net(x).roll(1, dims=1)  # would say that each clean image is misclassified

    y = predict(net, images)
    with Oracle(net, images, Untargeted(y), THREAT, view=Shifted()) as o:
        o.gradient(images, torch.arange(12), margin)
    assert not o.found.fallen.any()
    assert (o.forwards == 4).all()  # three for the view, one to judge


def test_a_detectors_refusal_is_no_success(net, images):
    class Detector(nn.Module):
        rejects = True

        def forward(self, x):
            return net(x)

        def predict(self, x):
            return torch.full((len(x),), ABSTAIN)

    goal = Untargeted(predict(net, images))
    with Oracle(Detector(), images, goal, THREAT) as o:
        o.judge(images, torch.arange(12))
        assert not o.found.fallen.any()
    Detector.rejects = False  # now it is a statistical abstention: an error
    with Oracle(Detector(), images, goal, THREAT) as o:
        o.judge(images, torch.arange(12))
        assert o.found.fallen.all()


def test_one_lucky_draw_does_not_fell_a_randomised_model(images):
    class Coin(nn.Module):
        stochastic = True

        def __init__(self, wrong):
            super().__init__()
            self.wrong, self.generator = wrong, torch.Generator().manual_seed(0)

        def forward(self, x):
            wrong = torch.rand(len(x), generator=self.generator) < self.wrong
            return torch.stack([torch.zeros(len(x)), wrong * 2.0 - 1], dim=1)

    goal = Untargeted(torch.zeros(12, dtype=torch.int64))
    for chance, expected in ((0.2, 0), (0.9, 12)):
        with Oracle(Coin(chance), images, goal, THREAT) as o:
            for _ in range(20):
                left = o.standing()
                if len(left):
                    o.judge(images[left], left)
        assert o.found.fallen.sum() == expected
        assert (o.forwards[o.found.fallen] >= 53).all()
    with Oracle(Coin(0.9), images, goal, THREAT, max_queries=20) as o:  # cannot pay for the fresh draws
        o.judge(images, torch.arange(12))
        assert not o.found.fallen.any()
        assert (o.forwards == 1).all()


def test_a_vote_ends_where_it_is_decided_with_the_verdict_of_the_whole():
    """Each row answers by a script: its verdict is that of all 20, or 80, answers, its price that of those needed."""
    count = 200
    chance = torch.linspace(0.3, 0.9, count)[:, None]
    script = torch.rand(count, 101, generator=torch.Generator().manual_seed(0)) < chance
    script[::2, :21] = True  # up to the long vote
    script[::5, 1:21] = torch.arange(20) % 2 == 0  # a tie is no majority

    class Scripted(nn.Module):
        stochastic = True

        def __init__(self):
            super().__init__()
            self.asked = torch.zeros(count, dtype=torch.int64)

        def forward(self, x):
            assert len(x)
            row = (x[:, 0, 0, 0] * count).round().long()
            wrong = script[row, self.asked[row]]
            self.asked[row] += 1
            return torch.eye(2)[torch.where(wrong, 1 - labels[row], labels[row])]

    def vote(answers, size):
        """Return whether most of the first `size` answers are wins, and how many of them tell."""

        def outcomes(asked):
            return {sum([*answers[:asked], *[rest] * (size - asked)]) > size // 2 for rest in (0, 1)}

        return sum(answers[:size]) > size // 2, next(n for n in range(size + 1) if len(outcomes(n)) == 1)

    images = (torch.arange(count) / count).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    labels = torch.arange(count) % 2
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    with Oracle(Scripted(), images, Untargeted(labels), THREAT) as o:
        for some in order.split(150):
            o.judge(images[some], some)
    both = 0
    for row, answers in enumerate(script.long().tolist()):
        price, fell = 1, bool(answers[0])
        for size in (20, 80):
            if fell:
                fell, asked = vote(answers[price:] + [0] * 80, size)
                price += asked
                both += size == 80
        assert (bool(o.found.fallen[row]), int(o.forwards[row])) == (fell, price)
    assert both > 50 < o.found.fallen.sum() < both


def test_a_randomised_model_votes_once_on_points_outside_the_threat(images):
    """They are never kept; a search that walks out there wants to know all the same."""

    class Wrong(nn.Module):
        stochastic = True

        def forward(self, x):
            return torch.tensor([[0.0, 1.0]]).expand(len(x), 2)

    goal, far = Untargeted(torch.zeros(12, dtype=torch.int64)), images.clone()
    far[::2] = 1 - far[::2].round()  # farther than the budget
    with Oracle(Wrong(), images, goal, THREAT) as o:
        o.judge(far, torch.arange(12))
    assert o.verdict.all()
    assert o.forwards.tolist() == [12, 53] * 6  # a vote of 20, or of 80, is decided by its 11th, or 41st, answer
    assert o.found.fallen.tolist() == [False, True] * 6
    wide = Lp("linf", torch.tensor([1.0] * 3 + [0.2] * 9, dtype=torch.float64))  # a budget for each sample
    with Oracle(Wrong(), images, goal, wide) as o:
        o.judge(far[[4, 2]], torch.tensor([4, 2]))
    assert o.forwards[[4, 2]].tolist() == [12, 53]


def test_points_outside_the_threat_are_never_kept(net, images):
    y = predict(net, images)
    with Oracle(net, images, Untargeted((y + 1) % 4), THREAT) as o:  # everything is a success
        o.judge(1 - images, torch.arange(12))
        assert not o.found.fallen[(1 - 2 * images).abs().flatten(1).amax(dim=1) > 0.21].any()
        o.judge(images, torch.arange(12))
    assert o.found.fallen.all()
    assert torch.equal(o.best, images)


def test_the_best_failure_is_the_one_with_the_highest_loss(net, images):
    y = predict(net, images)
    goal = Untargeted(y)
    candidates = [(images + shift).clamp(0, 1) for shift in (0.1, -0.1, 0.05)]
    with Oracle(net, images, goal, THREAT, stop="never") as o:
        for c in candidates:
            o.judge(c, torch.arange(12), cross_entropy)
    values = torch.stack([cross_entropy(net(c), goal) for c in candidates])
    wrong = torch.stack([labels_of(net(c)) != y for c in candidates])
    for i in range(12):
        allowed = wrong[:, i] if wrong[:, i].any() else torch.ones(3, dtype=torch.bool)
        best = max(range(3), key=lambda k, i=i, allowed=allowed: values[k, i].item() if allowed[k] else -1e9)
        assert torch.equal(o.best[i], candidates[best][i])


def test_in_a_tie_the_later_candidate_stays(net, images):
    with oracle(net, images, stop="never") as o:
        for shift in (0.01, 0.02):
            o.judge((images + shift).clamp(0, 1), torch.arange(12), lambda logits, goal: logits[:, 0] * 0)
    kept = (o.best == (images + 0.02).clamp(0, 1)).flatten(1).all(dim=1)
    assert (kept | o.found.fallen).all()
    assert kept.any()


def test_a_minimum_norm_threat_keeps_the_nearest_success(images):
    def always_one(x):
        return torch.stack([torch.zeros(len(x)), torch.ones(len(x))], dim=1).to(x)

    with Oracle(always_one, images, Untargeted(torch.zeros(12, dtype=torch.int64)), Lp("l2", None)) as o:
        for shift in (0.3, 0.1, 0.2):
            o.judge(images * (1 - shift), torch.arange(12))
        assert torch.allclose(o.best, images * 0.9)
        assert len(o.standing()) == 12  # nearer ones are still wanted
        o.judge(images, torch.arange(12))
        assert len(o.standing()) == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x.flatten(), r"shape \(12, K\)"),
        (lambda x: x.mean(dim=(2, 3)).long(), "floating-point logits"),
        (lambda x: "cat", "floating-point logits"),
        (lambda x: x.mean(dim=(2, 3)), r"labels must be in 0 .. 0"),
    ],
)
def test_a_model_of_the_wrong_shape_is_named(images, model, message):
    with (
        Oracle(model, images, Untargeted(torch.arange(12) % 4), THREAT) as o,
        pytest.raises((ValueError, TypeError), match=message),
    ):
        o.scores(images, torch.arange(12))


def test_a_dtype_mismatch_is_explained(net, images):
    with (
        Oracle(net, images.float(), Untargeted(torch.arange(12) % 4), THREAT) as o,
        pytest.raises(ValueError, match=r"torch.float64 but the images torch.float32"),
    ):
        o.scores(images.float(), torch.arange(12))


def test_frozen_restores_every_mode_and_flag():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = torch.ones(2)
    before = [part.training for part in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), frozen(model, model, len):
        assert not any(part.training for part in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        raise RuntimeError("inside")
    assert before == ([part.training for part in model.modules()], [p.requires_grad for p in model.parameters()])
    assert model[0].bias.grad.tolist() == [1, 1]
