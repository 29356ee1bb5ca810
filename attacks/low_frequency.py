"""Low-frequency attacks: NES and PGD whose noise is drawn, or whose steps are taken, in the lowest frequencies.

Threat and access: as the attack itself.
Source: Guo, Frank and Weinberger 2018, "Low Frequency Adversarial Perturbation" (1809.08758).
The basis is a part that any of these attacks takes, `NES(basis=DCT(0.25))`; these names only set its default.
Departure: half of the frequencies along each axis, for 28- and 32-pixel images; the original searches the share, from
1/32 at 224 pixels. Too small a share costs successes, and the gain depends on the net: `benchmarks/low_frequency.py`
halves the queries of NES on an undefended MNIST net at 4/7, and sees no gain on an undefended CIFAR-10 net nor on one
trained with PGD.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from robustbench_lite.attacks.basis import DCT, Basis
from robustbench_lite.attacks.nes import NES
from robustbench_lite.attacks.pgd import PGD

__all__ = ["LowFrequencyNES", "LowFrequencyPGD"]


@dataclass(frozen=True)
class LowFrequencyNES(NES):
    """NES with probes of low frequencies."""

    basis: Basis = field(default=DCT(0.5))


@dataclass(frozen=True)
class LowFrequencyPGD(PGD):
    """PGD whose random start and gradients are projected on the low frequencies.

    Signs of such a gradient (linf), sparse steps (l1) and the image bounds bring some of the others back.
    """

    basis: Basis = field(default=DCT(0.5))
