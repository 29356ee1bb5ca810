"""How far analysis by synthesis is safe, if its inner searches are right: estimates, no certificates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from robustbench_lite.certify.base import Certifier
from robustbench_lite.certify.errors import CannotCertify
from robustbench_lite.core.errors import lookup
from robustbench_lite.core.models import Model, frozen, labels_of
from robustbench_lite.core.results import Certificate, Status
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat
from robustbench_lite.defenses._latents import FixedLatents, best_fixed, descend
from robustbench_lite.defenses.abs import ABS, BinaryABS, Explanation

__all__ = ["ABSBound", "Rivals"]

DUAL = {"l2": 2.0, "linf": 1.0, "l1": torch.inf}
FORMS = ("paper", "lipschitz", "linear")
AT_ONCE = 4  # images whose rivals are looked for together
SMALL = 1e-12
FAR, UNBOUNDED_STEPS = 1e3, 50  # of the search without a bound on latents


class Rivals(NamedTuple):
    """What images are nearest to falling to, class by class.

    Attributes:
        radii: (B, K), the least ratio found; +inf for the predicted class. The estimate is their minimum.
        images: the reconstructions (B, K, C, H, W) that give them.
    """

    radii: Tensor
    images: Tensor


@dataclass(frozen=True)
class ABSBound(Certifier):
    """The distance within which the decision of `ABS` cannot change, as far as its searches find what there is.

    With l_c the minimum over z of ||x - G_c(z)||^2 + KL(z), y the predicted class, z_y its latent and D_y the distance
    of its reconstruction:

    - "paper": the least distance D_c of any reconstruction by c, whatever its KL, changes by at most eps, hence stable
      in l2 while (D_y + eps)^2 + KL_y < (D_c - eps)^2, that is for eps < (D_c^2 - l_y) / (2 (D_y + D_c)), c the best
      other class.
    - "lipschitz": so does sqrt(l_c), hence the same with sqrt(l_c) for D_c.
    - "linear": hold z_y fixed. For every z of another class c the lead ||x - G_c(z)||^2 + KL(z) - l_y is linear in the
      perturbation, hence stable for eps < min over c and z of lead / (2 ||G_y(z_y) - G_c(z)||_q), q dual to the norm.
      The minimum is over all z: where an image is best explained is not where it is nearest to falling, and the ratio
      at the best explanations alone promises too much. Searched over the fixed latents, then by descent on the ratio
      from the best of each class and from the best explanation.

    The first two are l2 bounds; linf is bounded by l2 / sqrt(D), l1 by l2. All are estimates and never count as
    certified, for two reasons: minima over z are found by search, not proven, and the deployed search may explain a
    perturbed image by y worse than z_y does.

    Source: Schott, Rauber, Bethge, Brendel, "Towards the First Adversarially Robust Neural Network Model on MNIST",
    2018, arXiv:1805.09190, for the first; the others are ours.

    Attributes:
        form: "paper", "lipschitz" or "linear".
        starts: of the "linear" form, fixed latents of each class to descend from, besides its best explanation.
        steps: of each descent.
        learning_rate: of each descent.

    Raises:
        ValueError: an unknown form, or a number out of range.
    """

    kind: ClassVar[str] = "estimate"
    cheap: ClassVar[bool] = False

    form: str = "linear"
    starts: int = 4
    steps: int = 30
    learning_rate: float = 0.2

    def __post_init__(self) -> None:
        lookup(self.form, dict.fromkeys(FORMS), "form")
        if self.starts < 1 or self.steps < 0 or not self.learning_rate > 0:
            raise ValueError(
                "need starts >= 1, steps >= 0 and learning_rate > 0, got "
                f"{self.starts}, {self.steps} and {self.learning_rate:g}"
            )

    def supports(self, threat: Threat) -> bool:
        """Say yes to l2, linf and l1 balls."""
        return isinstance(threat, Lp) and threat.norm in DUAL

    def run(self, model: Model, x: Tensor, y: Tensor, threat: Threat, streams: Streams) -> Certificate:
        """Estimate the radii of one chunk."""
        inside, norm = _inside(model), cast("Lp", threat).norm
        found = inside.explain(x)
        if self.form == "linear":
            radii = self._rivals(inside, x, found, norm).radii.amin(dim=1).clamp_min(0)
        else:
            others = found.energies if self.form == "lipschitz" else _squared_distances(inside, x, found)
            radii = _by_lipschitz(found, others, x, norm)
        nothing = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return Certificate(
            status=torch.full((len(x),), int(Status.UNKNOWN), device=x.device),
            certified=nothing.bool(),
            radius=nothing,
            prediction=labels_of(-found.energies),
            kind=self.kind,
            confidence=0.0,
            samples=nothing.long(),
            estimate=radii.double(),
        )

    def radius(self, model: Model, x: Tensor, y: Tensor, norm: str, **options: Any) -> Tensor:
        """Return zeros (B,): an estimate certifies no eps. The estimates are in the certificate."""
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def rivals(self, model: Model, x: Tensor, norm: str) -> Rivals:
        """Return what the "linear" form is the minimum of, with the reconstructions that it comes from.

        The perturbation that a ratio is about goes from the image along `Lp.steepest` of the rival less the
        reconstruction by the predicted class.

        Args:
            model: an `ABS`.
            x: images (B, C, H, W).
            norm: "l2", "linf" or "l1".

        Raises:
            CannotCertify: another model.
            ValueError: another norm.
        """
        lookup(norm, DUAL, "norm")
        inside = _inside(model)
        with frozen(inside):
            return self._rivals(inside, x, inside.explain(x), norm)

    @torch.no_grad()
    def _rivals(self, model: ABS, x: Tensor, found: Explanation, norm: str) -> Rivals:
        with torch.inference_mode(False):
            rows = torch.split(torch.arange(len(x), device=x.device), AT_ONCE)
            parts = [
                self._search(_Ratios(model, x[part].clone(), Explanation(*(v[part] for v in found)), DUAL[norm]))
                for part in rows
            ]
        return Rivals(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _search(self, ratios: _Ratios) -> Rivals:
        """Return each class's least ratio over its latents, and the image that gives it."""
        model = ratios.model
        z = torch.cat([ratios.found.latents[:, None], self._starts(ratios)], dim=1)  # (b, starts + 1, K, d)
        best, least = descend(
            lambda flat: ratios.at(flat.view(z.shape)).flatten(0, 1),
            z.flatten(0, 1),
            steps=self.steps,
            learning_rate=self.learning_rate,
            radius=model.radius,
        )
        least, at = least.view(z.shape[:3]).min(dim=1)  # (b, K)
        chosen = best.view(z.shape).gather(1, at[:, None, :, None].expand(-1, 1, -1, z.shape[3])).squeeze(1)
        return Rivals(least, model.decoder(chosen))

    def _starts(self, ratios: _Ratios) -> Tensor:
        """Return for each class the fixed latents of the least ratios, (b, starts, K, d)."""
        least, best = None, None
        for fixed in ratios.model.fixed_latents():
            value = ratios.of_fixed(fixed)
            z = fixed.latents[None, :, None].expand(len(value), -1, value.shape[2], -1)
            if least is not None and best is not None:
                value, z = torch.cat([least, value], dim=1), torch.cat([best, z], dim=1)
            least, at = value.topk(min(self.starts, value.shape[1]), dim=1, largest=False)
            best = z.gather(1, at[..., None].expand(-1, -1, -1, z.shape[3]))
        assert best is not None
        return best


class _Ratios:
    """The ratios lead / (2 ||G_y(z_y) - G_c(z)||_q) around b images, by class; +inf for the predicted class.

    Args:
        model: the classifier.
        x: images (b, C, H, W).
        found: their explanations.
        dual: q.
    """

    def __init__(self, model: ABS, x: Tensor, found: Explanation, dual: float) -> None:
        self.model, self.x, self.found, self.dual = model, x, found, dual
        rows, label = torch.arange(len(x), device=x.device), found.energies.argmin(dim=1)
        self.energy, self.image = found.energies[rows, label], found.images[rows, label].flatten(1)
        classes = torch.arange(found.energies.shape[1], device=x.device)
        self.own = classes == label[:, None]

    def at(self, z: Tensor) -> Tensor:
        """Return the ratios (b, s, K) at latents (b, s, K, d), differentiable."""
        images = self.model.decoder(z.flatten(0, 1)).flatten(2).view(*z.shape[:3], -1)
        away = (images - self.x.flatten(1)[:, None, None]).square().sum(dim=3)
        energies = away + self.model.beta / 2 * z.square().sum(dim=3)
        return self._ratios(energies, torch.linalg.vector_norm(images - self.image[:, None, None], self.dual, dim=3))

    def of_fixed(self, fixed: FixedLatents) -> Tensor:
        """Return the ratios (b, n, K) at fixed latents."""
        flat, images = self.x.flatten(1), fixed.images.flatten(0, 1)
        shape = (len(flat), *fixed.squares.shape)
        squares = (flat.square().sum(dim=1)[:, None, None] + fixed.squares) - 2 * (flat @ images.T).view(shape)
        energies = squares + self.model.beta / 2 * fixed.latents.square().sum(dim=1, keepdim=True)
        return self._ratios(energies, torch.cdist(self.image, images, p=self.dual).view(shape))

    def _ratios(self, energies: Tensor, lengths: Tensor) -> Tensor:
        ratios = (energies - self.energy[:, None, None]) / (2 * lengths.clamp_min(SMALL))
        return ratios.masked_fill(self.own[:, None], torch.inf)


def _by_lipschitz(found: Explanation, others: Tensor, x: Tensor, norm: str) -> Tensor:
    """Return the radii (B,) where roots of `others` (B, K), Lipschitz in x, take the place of the other energies."""
    energy, label = found.energies.min(dim=1)
    other = others.scatter(1, label[:, None], torch.inf).amin(dim=1)
    own = found.images[torch.arange(len(x), device=x.device), label]
    distance = (x - own).flatten(1).norm(dim=1)
    radii = ((other - energy) / (2 * (distance + other.sqrt()))).clamp_min(0)
    scaled: Tensor = radii / math.sqrt(x[0].numel()) if norm == "linf" else radii
    return scaled


@torch.no_grad()
def _squared_distances(model: ABS, x: Tensor, found: Explanation) -> Tensor:
    """Return min over all z of ||x - G_c(z)||^2, (B, K), as a search finds it; its latents have no bound."""

    def squared(part: Tensor, z: Tensor) -> Tensor:
        return (model.decoder(z) - part.unsqueeze(1)).square().flatten(2).sum(dim=2)

    parts = []
    with torch.inference_mode(False):
        for part in torch.split(x.clone(), AT_ONCE):
            start = best_fixed(model.fixed_latents(), part, beta=0.0)
            work = partial(squared, part)
            parts.append(descend(work, start, steps=UNBOUNDED_STEPS, learning_rate=model.learning_rate, radius=FAR)[1])
    return torch.minimum(torch.cat(parts), squared(x, found.latents))


def _inside(model: Model) -> ABS:
    if not isinstance(model, ABS) or isinstance(model, BinaryABS):
        raise CannotCertify(
            f"ABSBound is about ABS, whose energies are quadratic in the image, not {type(model).__name__}"
        )
    return model
