"""A certifier of what is inside a defense, whose certificates are the defense's own."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

from torch import Tensor

from robustbench_lite.certify.base import Certifier
from robustbench_lite.certify.errors import CannotCertify
from robustbench_lite.core.models import Model
from robustbench_lite.core.results import Certificate
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Threat

__all__ = ["Inside"]


@dataclass(frozen=True)
class Inside(Certifier):
    """Certify a part of the deployed model: `Inside(SmoothedVote(0.5, 1000))` for a defense that votes around `net`.

    That the certificate of the part holds for the whole is the claim of who binds it; a defense does so in its
    `certifiers()`. An evaluation tests the claim: an attack inside a certified radius is a violation. `kind`, `cheap`,
    `forgives` and `version` are the certifier's; `smooths` is not, for the claim is about what is deployed.

    Attributes:
        certifier: makes the certificate.
        part: name of the attribute of the defense that it is made for.
    """

    certifier: Certifier
    part: str = "net"

    kind = property(attrgetter("certifier.kind"))
    cheap = property(attrgetter("certifier.cheap"))
    forgives = property(attrgetter("certifier.forgives"))
    version = property(attrgetter("certifier.version"))

    def supports(self, threat: Threat) -> bool:
        """Say what the certifier says."""
        return self.certifier.supports(threat)

    def run(self, model: Model, x: Tensor, y: Tensor, threat: Threat, streams: Streams) -> Certificate:
        """Certify one chunk."""
        return self.certifier.run(self._inner(model), x, y, threat, streams)

    def radius(self, model: Model, x: Tensor, y: Tensor, norm: str, **options: Any) -> Tensor:
        """Return the radii (B,) that the certifier finds for the part; the arguments are its own."""
        return self.certifier.radius(self._inner(model), x, y, norm, **options)

    def _inner(self, model: Model) -> Model:
        if not hasattr(model, self.part):
            raise CannotCertify(f"{type(model).__name__} has no part {self.part!r} that {self.certifier} could certify")
        return cast("Model", getattr(model, self.part))
