"""The attack whose latents follow: exact where the margin is linear, next to brute force where images are cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks import BPDA, FMN
from robustbench_lite.attacks.envelope_attack import EnvelopeAttack
from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.core.goals import Targeted, Untargeted
from robustbench_lite.core.insides import Explaining, Explanation
from robustbench_lite.core.losses import margin
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.abs import ABS, BinaryABS
from tests.defenses.abs_toys import Curved, around

NORMS = ["linf", "l2", "l1"]
DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


class Fixed(nn.Module):
    """One image a class, whatever the latents: the margins between classes are linear in the input."""

    centres: Tensor
    cut: float | None = None

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("centres", 0.3 + 0.4 * torch.rand(4, 1, 6, 6, generator=generator, dtype=torch.float64))
        self.searches = self.follows = 0

    def explain(self, x: Tensor) -> Explanation:
        self.searches += len(x)
        return self._found(x)

    def follow(self, x: Tensor, latents: Tensor, steps: int) -> Explanation:
        self.follows += len(x)
        return self._found(x)

    def _found(self, x: Tensor) -> Explanation:
        images = self.centres.expand(len(x), -1, -1, -1, -1)
        return Explanation(x.new_zeros(len(x), 4, 2), images, (x[:, None] - images).square().flatten(2).sum(dim=2))

    def logits_at(self, x: Tensor, explanation: Explanation) -> Tensor:
        return -(x[:, None] - explanation.images).square().flatten(2).sum(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits_at(x, self._found(x))


class Lying(Fixed):
    """Latents that follow show every image as fooled; a search shows the truth."""

    def logits_at(self, x: Tensor, explanation: Explanation) -> Tensor:
        logits = super().logits_at(x, explanation)
        return logits.roll(1, dims=1) if explanation.latents.any() else logits

    def follow(self, x: Tensor, latents: Tensor, steps: int) -> Explanation:
        return super().follow(x, latents, steps)._replace(latents=torch.ones_like(latents))


def near(n: int = 8) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 4
    noise = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 0.9 * Fixed().centres[y] + 0.1 * noise, y


def to_the_planes(x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Distances (n, 4) to the half-spaces where each class beats the label; +inf for the label."""
    centres, found = Fixed().centres.flatten(1), []
    for one, label in zip(x.flatten(1), y, strict=True):
        lead = (one - centres).square().sum(dim=1) - (one - centres[label]).square().sum()
        found.append(lead / (2 * torch.linalg.vector_norm(centres - centres[label], ord=DUAL[norm], dim=1)))
    return torch.stack(found).scatter(1, y[:, None], torch.inf)


@pytest.mark.parametrize(("norm", "near_enough"), [("l2", 1.001), ("linf", 1.15), ("l1", 1.15)])
def test_where_margins_are_linear_it_ends_near_the_nearest_half_space(norm: str, near_enough: float) -> None:
    x, y = near()
    found, exact = EnvelopeAttack()(Fixed(), x, y, Lp(norm, None)), to_the_planes(x, y, norm).amin(dim=1)
    assert found.success.all()
    assert (found.distance >= exact * (1 - 1e-9)).all()
    assert (found.distance / exact).median() < near_enough
    assert torch.allclose(found.distance, FMN(steps=200)(Fixed(), x, y, Lp(norm, None)).distance, rtol=0.01)


def test_a_budget_is_enough_or_it_is_not() -> None:
    x, y = near()
    exact = to_the_planes(x, y, "l2").amin(dim=1)
    for share, expected in ((1.02, True), (0.99, False)):
        for row, size in enumerate((share * exact).tolist()):
            found = EnvelopeAttack()(Fixed(), x[row : row + 1], y[row : row + 1], Lp("l2", size))
            assert found.success.item() is expected


def test_a_target_is_approached_along_its_own_plane() -> None:
    x, y = near()
    target = (y + 2) % 4
    exact = to_the_planes(x, y, "l2").gather(1, target[:, None]).squeeze(1)
    found = EnvelopeAttack()(Fixed(), x, Targeted(target), Lp("l2", None))
    assert found.success.all()
    assert (Fixed()(found.x_adv).argmax(dim=1) == target).all()
    assert (found.distance >= exact * (1 - 1e-9)).all()


def test_it_searches_anew_every_few_steps_and_pays_for_each_question() -> None:
    model, (x, y) = Fixed(), near(2)
    found = EnvelopeAttack(steps=10, renew=4)(model, x, y, Lp("l2", 1e-3))
    assert not found.success.any()
    assert (model.searches, model.follows) == (2 * 3, 2 * 7)
    assert found.forwards.tolist() == [1 + 10 + 1] * 2  # the clean image, a question a step, the last point
    assert found.backwards.tolist() == [10] * 2


def test_the_defense_alone_says_what_is_a_success() -> None:
    model, (x, y) = Lying(), near(4)
    found = EnvelopeAttack(steps=5, renew=100)(model, x, y, Lp("l2", 1e-3))
    assert not found.success.any()
    assert torch.equal(model(found.x_adv).argmax(dim=1), y)
    assert model.searches == 4 * 5  # the first, and one after each success that was denied
    far = EnvelopeAttack()(model, x, y, Lp("l2", None))
    assert far.success.all() and (model(far.x_adv).argmax(dim=1) != y).all()


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 10, 23, 27])
@pytest.mark.parametrize("declared", [{}, {"stochastic": True}, {"cost": 3}])
def test_it_never_exceeds_its_queries(budget: int, declared: dict[str, int]) -> None:
    model, (x, y) = Lying(), near(4)
    for name, value in declared.items():
        setattr(model, name, value)
    found = EnvelopeAttack(steps=50)(model, x, y, Lp("l2", None), max_queries=budget)
    assert (found.forwards <= budget).all()


@pytest.mark.parametrize("norm", [*NORMS, "l0"])
def test_on_smooth_decoders_it_comes_as_near_as_full_searches_do(norm: str) -> None:
    model = around(Curved(), latents=200, steps=10)
    x = torch.rand(6, 1, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.9 + 0.05
    y, threat = model.predict(x), Lp(norm, None)
    assert isinstance(model, Explaining)
    ours, full = EnvelopeAttack()(model, x, y, threat), FMN(steps=200)(model, x, y, threat)
    assert (model.predict(ours.x_adv) != y)[ours.success].all()
    assert (ours.success | ~full.success).all()
    assert (ours.distance <= 1.02 * full.distance + 1e-9).double().mean() > 0.8


def all_cuts(model: nn.Module, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """The distances to the nearest cut image with another answer, by trying all 512."""
    cuts = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 9)
    moved = (cuts != (x > 0.5).flatten(1).unsqueeze(1)) * (x.flatten(1) - 0.5).abs().unsqueeze(1)
    order = {"linf": torch.inf, "l2": 2, "l1": 1, "l0": 0}[norm]
    far = torch.linalg.vector_norm(moved, ord=order, dim=2)
    other = model(cuts.view(-1, 1, 3, 3)).argmax(dim=1) != y.unsqueeze(1)
    return far.masked_fill(~other, torch.inf).amin(dim=1)


@pytest.mark.parametrize("norm", [*NORMS, "l0"])
def test_cut_images_change_by_the_pixels_that_brute_force_finds(norm: str) -> None:
    model = around(Curved(), BinaryABS, latents=200, steps=10)
    x = torch.rand(12, 1, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = model.predict(x)
    exact, found = all_cuts(model, x, y, norm), EnvelopeAttack()(model, x, y, Lp(norm, None))
    assert found.success.all()
    assert (found.distance >= exact * (1 - 1e-9)).all()
    ratio = found.distance / exact
    assert ratio.median() < 1.01 and ratio.max() < 1.6


class OnesOrZeros(Fixed):
    """Images cut at `edge`: class 0 is all ones, class 1 all zeros."""

    def __init__(self, shape: tuple[int, ...], edge: float = 0.5) -> None:
        super().__init__()
        self.cut = edge
        self.centres = torch.stack([torch.ones(shape), torch.zeros(shape)])

    def _found(self, x: Tensor) -> Explanation:
        images = self.centres.to(x).expand(len(x), -1, -1, -1, -1)
        return Explanation(x.new_zeros(len(x), 2, 1), images, x.new_zeros(len(x), 2))

    def logits_at(self, x: Tensor, explanation: Explanation) -> Tensor:
        return super().logits_at(BPDA(lambda image: (image > self.cut).to(image.dtype))(x), explanation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("norm", "level", "eps", "enough"),
    [
        ("l2", 1.0, 2.0, True),
        ("l2", 1.0, 1.9, False),
        ("l1", 1.0, 8.0, True),
        ("linf", 1.0, 0.5, True),
        ("linf", 204 / 255, 0.3, True),
        ("linf", 204 / 255, 0.29, False),
        ("l0", 1.0, 16, True),
        ("l0", 1.0, 15, False),
    ],
)
def test_a_budget_that_just_reaches_the_cut_is_enough(
    norm: str, level: float, eps: float, enough: bool, dtype: torch.dtype
) -> None:
    x, y = torch.full((2, 1, 1, 31), level, dtype=dtype), torch.tensor([0, 0])
    model, threat = OnesOrZeros((1, 1, 31)), Lp(norm, eps)
    for steps in (3, 60):  # the first point searched is in the widest ball
        found = EnvelopeAttack(steps=steps)(model, x, y, threat)
        assert found.success.tolist() == [enough] * 2
        assert threat.contains(found.x_adv, x).all()


@pytest.mark.parametrize("edge", [0.1, 0.3, 0.7])
def test_the_cut_is_where_the_images_have_it(edge: float) -> None:
    x = torch.ones(1, 1, 1, 31, dtype=torch.float64)
    found = EnvelopeAttack(steps=60)(OnesOrZeros((1, 1, 31), edge), x, torch.tensor([0]), Lp("l2", None))
    assert found.distance.item() == pytest.approx(4 * (1 - edge), rel=1e-6)


def test_in_l0_a_pixel_is_paid_once_for_all_its_channels() -> None:
    model, x = OnesOrZeros((3, 1, 3)), torch.ones(1, 3, 1, 3)
    for per, needed in (("pixel", 2), ("coordinate", 5)):
        for eps in (needed - 1, needed):
            found = EnvelopeAttack(steps=40)(model, x, torch.tensor([0]), Lp("l0", eps, per=per))
            assert found.success.item() is (eps == needed)


@pytest.mark.parametrize("kind", [ABS, BinaryABS])
def test_samples_leave_and_questions_are_split_without_a_trace(kind: type[ABS]) -> None:
    model = around(Curved(), kind, latents=100, steps=5)
    x = torch.rand(40, 1, 3, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    y = model.predict(x)
    far = EnvelopeAttack(steps=60)(model, x, y, Lp("l2", None)).distance
    assert far.isfinite().all()
    sizes = far * torch.tensor([0.5, 1.01, 1.3, 3.0]).repeat(10)
    threat = Lp("l2", sizes)
    whole, split = (EnvelopeAttack(steps=60)(model, x, y, threat, memory_budget=size) for size in (None, 1))
    assert torch.equal(whole.success, split.success) and torch.allclose(whole.x_adv, split.x_adv, atol=1e-9)
    assert (whole.forwards == split.forwards).all() and whole.forwards.unique().numel() > 1
    assert whole.success.view(10, 4)[:, 1:].double().mean() > 0.85
    assert (whole.distance[whole.success] <= sizes[whole.success] * (1 + 1e-6)).all()


def test_a_failure_keeps_a_point_that_moved() -> None:
    x, y = near(4)
    found = EnvelopeAttack(steps=20)(Fixed(), x, y, Lp("l2", 0.05))
    before, after = (-margin(Fixed()(at), Untargeted(y)) for at in (x, found.x_adv))
    assert not found.success.any() and (after < before).all()


def test_cut_images_keep_the_pixels_that_stay_on_their_side() -> None:
    model = around(Curved(), BinaryABS, latents=100, steps=5)
    x = torch.rand(6, 1, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = EnvelopeAttack(steps=40)(model, x, model.predict(x), Lp("l2", None))
    crossed = (found.x_adv > 0.5) != (x > 0.5)
    assert torch.equal(found.x_adv[~crossed], x[~crossed])
    assert (found.x_adv[crossed] - 0.5).abs().max() <= 1.01e-4


def test_each_sample_is_attacked_by_itself() -> None:
    model = around(Curved(), BinaryABS, latents=100, steps=5)
    x = torch.rand(5, 1, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y, attack = model.predict(x), EnvelopeAttack(steps=30)
    together = attack(model, x, y, Lp("l2", None))
    for row in range(5):
        alone = attack(model, x[row : row + 1], y[row : row + 1], Lp("l2", None))
        assert torch.allclose(alone.x_adv[0], together.x_adv[row], atol=1e-9)


def test_bad_settings_and_other_models_are_refused() -> None:
    x, y = near(2)
    with pytest.raises(NotApplicableError, match="Explaining"):
        EnvelopeAttack()(nn.Flatten(), x, y, Lp("l2", None))
    for name, value in (("steps", 0), ("follow", 0), ("renew", 0.5), ("gamma_init", 1.0)):
        with pytest.raises(ValueError, match=name):
            replace(EnvelopeAttack(), **{name: value})
