"""Analysis by synthesis: the class whose generative model explains the image best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from robustbench_lite.attacks.bpda import BPDA
from robustbench_lite.attacks.envelope_attack import EnvelopeAttack
from robustbench_lite.attacks.latent_descent import LatentDescent
from robustbench_lite.core.insides import Explanation
from robustbench_lite.core.threats import Lp, Threat
from robustbench_lite.defenses._latents import Decoders, FixedLatents, best_fixed, descend, fixed_latents
from robustbench_lite.defenses.base import Wrapper

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.certify.base import Certifier

__all__ = ["ABS", "BinaryABS", "Explanation"]

CPU_VALUES, GPU_VALUES = 2**17, 2**22  # of the reconstructions that descend together; on a CPU what its cache holds
STEEPNESS = 10.0  # of the sigmoid that stands in for the cut
CLOSE = 0.1  # of the learning rate, for latents that follow an image


class ABS(Wrapper):
    """Invert every class's decoder G_c on the image, and compare how well it is explained.

    l_c(x) = min_z [||x - G_c(z)||^2 + beta ||z||^2 / 2] over ||z|| <= radius; logits are -scale * l_c. The search for z
    starts at the best of a fixed set of latents, the same for all images and classes, and goes on by Adam; the best
    point met counts. Each image is searched for by itself. The fixed latents are drawn from a seed; what the
    decoders make of them (226 MB for 8000 on MNIST) is reckoned at the first call and kept. What the search finds
    is never below the minimum, and may be above it.

    Gradients are those of the envelope theorem: at the inner minimum the derivative of l_c by z vanishes, hence
    grad l_c = 2 (x - G_c(z)) with z held fixed. The published code cuts the gradient off instead.

    Source: Schott, Rauber, Bethge, Brendel, "Towards the First Adversarially Robust Neural Network Model on MNIST",
    2018, arXiv:1805.09190, with the constants of its published code. Departures: 20 steps of 0.3 with shorter averages
    in place of 50 of 0.05, which end nearer to the minimum (on the published nets, with 2000 latents, 0.07 above what
    200 steps reach, in the mean over classes; the original's 0.47); the best point, not the last; long latents are
    shortened, where that code takes the absolute values of their entries and one step less than it says.

    Args:
        net: has a `decoder` (such as `ClassVAEs`); its encoders are left behind.
        latents: fixed latents drawn.
        steps: Adam steps from the best of them.
        learning_rate: Adam's.
        radius: largest length of a latent.
        drop: share of the fixed latents, the least likely, that is left out.
        beta: weight of the KL divergence ||z||^2 / 2.
        scale: of the logits; the published code's 440 is for MNIST's energies over 784 pixels.
        eta: of the `posterior`.
        seed: of the fixed latents.

    Raises:
        TypeError: a net without a decoder.
        ValueError: a setting out of range, or decoders for a single class.
    """

    cut: ClassVar[float | None] = None
    decoder: Decoders

    def __init__(
        self,
        net: nn.Module,
        latents: int = 8000,
        steps: int = 20,
        learning_rate: float = 0.3,
        radius: float = 5.0,
        drop: float = 0.1,
        beta: float = 1.0,
        scale: float = 440 / 784,
        eta: float = 3.9e-5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        decoder = getattr(net, "decoder", None)
        if not isinstance(decoder, nn.Module):
            raise TypeError(
                f"{type(self).__name__} needs a net with a decoder for each class, and {type(net).__name__} has none: "
                "take model=class_vaes"
            )
        if latents < 1 or steps < 0:
            raise ValueError(f"latents must be at least 1 and steps at least 0, got {latents} and {steps}")
        for name, value in (("learning_rate", learning_rate), ("radius", radius), ("scale", scale)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {value:g}")
        if not (0 <= drop < 1 and beta >= 0 and eta >= 0):
            raise ValueError(f"need 0 <= drop < 1, beta >= 0 and eta >= 0, got {drop:g}, {beta:g} and {eta:g}")
        self.decoder = cast("Decoders", decoder)
        if self.decoder.num_classes < 2:
            raise ValueError(f"a classifier has at least 2 classes, got decoders for {self.decoder.num_classes}")
        self.latents, self.steps, self.learning_rate, self.radius = latents, steps, learning_rate, radius
        self.drop, self.beta, self.scale, self.eta, self.seed = drop, beta, scale, eta, seed

    def seen(self, x: Tensor) -> Tensor:
        """Return the images (B, C, H, W) that the decoders are to explain."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W), with the gradients of the envelope theorem.

        Raises:
            ValueError: images of another shape than the decoders'.
        """
        return self.logits(self.seen(x), self.explain(x))

    def logits(self, seen: Tensor, explanation: Explanation) -> Tensor:
        """Return logits (B, K) for `seen` images, the explanation held fixed."""
        return -self.scale * self._energies(seen, explanation.latents, explanation.images)

    def logits_at(self, x: Tensor, explanation: Explanation) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W), the explanation held fixed."""
        return self.logits(self.seen(x), explanation)

    def posterior(self, x: Tensor) -> Tensor:
        """Return p(c) = (exp(s_c) + eta) / (sum_j exp(s_j) + K eta) of the logits s: uniform far from all classes."""
        s = self(x)
        floor = s.new_tensor(self.eta).log()
        return torch.logaddexp(s, floor.expand_as(s)).softmax(dim=1)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the best reconstruction of each class, (B, K, C, H, W), of images (B, C, H, W)."""
        return self.explain(x).images

    @torch.no_grad()
    def explain(self, x: Tensor) -> Explanation:
        """Return the best explanation that the search finds, of images (B, C, H, W) by each class; no gradients.

        Raises:
            ValueError: images of another shape than the decoders'.
        """
        return self._explained(x, None, self.steps, self.learning_rate)

    @torch.no_grad()
    def follow(self, x: Tensor, latents: Tensor, steps: int) -> Explanation:
        """Return the best explanation within a few short steps from latents (B, K, d); no gradients.

        For images that differ little from those whose best latents these are, a fraction of the work of `explain`.

        Raises:
            ValueError: images of another shape than the decoders'.
        """
        return self._explained(x, latents, steps, CLOSE * self.learning_rate)

    def _explained(self, x: Tensor, latents: Tensor | None, steps: int, learning_rate: float) -> Explanation:
        if x.ndim != 4 or x.shape[1:] != torch.Size(self.decoder.image_shape):
            raise ValueError(
                f"the decoders make images {tuple(self.decoder.image_shape)}, got a batch {tuple(x.shape)}"
            )
        with torch.inference_mode(False):  # the search needs gradients by the latents
            seen = self.seen(x.detach().clone() if x.is_inference() else x.detach())
            values = CPU_VALUES if x.device.type == "cpu" else GPU_VALUES
            size = max(1, values // (self.decoder.num_classes * seen.shape[1:].numel()))
            parts = torch.split(seen, size)
            starts = [None] * len(parts) if latents is None else torch.split(latents, size)
            found = [self._search(part, z, steps, learning_rate) for part, z in zip(parts, starts, strict=True)]
        return Explanation(*(torch.cat(values) for values in zip(*found, strict=True)))

    def _search(self, seen: Tensor, start: Tensor | None, steps: int, learning_rate: float) -> Explanation:
        def energies(z: Tensor) -> Tensor:
            return self._energies(seen, z, self.decoder(z))

        start = best_fixed(self.fixed_latents(), seen, self.beta) if start is None else start
        z, _ = descend(energies, start, steps=steps, learning_rate=learning_rate, radius=self.radius)
        images = self.decoder(z)
        return Explanation(z, images, self._energies(seen, z, images))

    def _energies(self, seen: Tensor, z: Tensor, images: Tensor) -> Tensor:
        away = (seen.unsqueeze(1) - images).square().flatten(2).sum(dim=2)
        return away + self.beta / 2 * z.square().sum(dim=2)

    def fixed_latents(self) -> list[FixedLatents]:
        """Return the fixed latents with each class's images of them, in chunks."""
        return fixed_latents(self.decoder, self.latents, drop=self.drop, radius=self.radius, seed=self.seed)

    def adaptive_attacks(self, threat: Threat) -> list[Attack]:
        """Return the attack by envelope gradients, and the walk to a reconstruction."""
        if not isinstance(threat, Lp):
            return []
        return [EnvelopeAttack(), LatentDescent()]

    def certifiers(self) -> list[Certifier]:
        """Return the paper's bound and the better one; both are estimates."""
        from robustbench_lite.defenses.abs_bound import ABSBound  # which knows this class

        return [ABSBound("paper"), ABSBound("linear")]


class BinaryABS(ABS):
    """`ABS` of the image cut at 1/2: what is above it is 1, the rest 0. Energies are weighed by class.

    The cut stops small linf perturbations of images that are nearly binary already, and its gradient is zero; the
    attacker's view puts a steep sigmoid in its place (BPDA). No bound of a continuous perturbation is given.

    Source: as for `ABS`. The published code has factors for its own nets (`conf/defense/binary_abs.yaml`).

    Args:
        net: as for `ABS`, and so are the others.
        factors: one number a class that its energy is multiplied by; None: ones.

    Raises:
        ValueError: not one positive factor a class, or as for `ABS`.
    """

    cut: ClassVar[float | None] = 0.5

    def __init__(
        self,
        net: nn.Module,
        factors: Sequence[float] | None = None,
        latents: int = 8000,
        steps: int = 20,
        learning_rate: float = 0.3,
        radius: float = 5.0,
        drop: float = 0.1,
        beta: float = 1.0,
        scale: float = 440 / 784,
        eta: float = 3.9e-5,
        seed: int = 0,
    ) -> None:
        super().__init__(net, latents, steps, learning_rate, radius, drop, beta, scale, eta, seed)
        self.factors = None if factors is None else [float(factor) for factor in factors]
        classes = self.decoder.num_classes
        if self.factors is not None and (len(self.factors) != classes or not all(f > 0 for f in self.factors)):
            raise ValueError(f"factors must be {classes} positive numbers, one a class, got {factors}")

    def seen(self, x: Tensor) -> Tensor:
        """Return the images cut at 1/2."""
        return (x > 0.5).to(x.dtype)

    def logits_at(self, x: Tensor, explanation: Explanation) -> Tensor:
        """Return logits (B, K) of images, the explanation held fixed; the gradient of the cut is the identity's."""
        return self.logits(BPDA(self.seen)(x), explanation)

    def logits(self, seen: Tensor, explanation: Explanation) -> Tensor:
        """Return logits (B, K) for `seen` images, the explanation held fixed."""
        logits = super().logits(seen, explanation)
        return logits if self.factors is None else logits * logits.new_tensor(self.factors)

    def certifiers(self) -> list[Certifier]:
        """Return none: the cut is no continuous function of the image."""
        return []

    def attack_view(self, samples: int = 1) -> nn.Module:
        """Return the defense with the gradient of a steep sigmoid for the cut's."""
        return _Softened(self)


class _Softened(nn.Module):
    def __init__(self, defense: BinaryABS) -> None:
        super().__init__()
        self.defense = defense
        self.cut = BPDA(defense.seen, _sigmoid)

    def forward(self, x: Tensor) -> Tensor:
        """Return the defense's logits (B, K)."""
        return self.defense.logits(self.cut(x), self.defense.explain(x))


def _sigmoid(x: Tensor) -> Tensor:
    return (STEEPNESS * (x - 0.5)).sigmoid()
