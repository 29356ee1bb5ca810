"""The attack whose latents follow: exact where the margin is linear, next to brute force where images are cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks import FMN
from robustbench_lite.attacks.envelope_attack import EnvelopeAttack
from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.core.goals import Targeted
from robustbench_lite.core.insides import Explaining, Explanation
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.abs import BinaryABS
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
    assert found.forwards.tolist() == [1 + 10] * 2  # the clean image, and a question a step
    assert found.backwards.tolist() == [10] * 2


def test_the_defense_alone_says_what_is_a_success() -> None:
    model, (x, y) = Lying(), near(4)
    found = EnvelopeAttack(steps=5, renew=100)(model, x, y, Lp("l2", 1e-3))
    assert not found.success.any()
    assert torch.equal(model(found.x_adv).argmax(dim=1), y)
    assert model.searches == 4 * 5  # the first, and one after each success that was denied
    far = EnvelopeAttack()(model, x, y, Lp("l2", None))
    assert far.success.all() and (model(far.x_adv).argmax(dim=1) != y).all()


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 23])
def test_it_never_exceeds_its_queries(budget: int) -> None:
    x, y = near(4)
    found = EnvelopeAttack(steps=50)(Lying(), x, y, Lp("l2", None), max_queries=budget)
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
