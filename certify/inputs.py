"""What bounds start from: the box, and the ball, of a threat around images; or a box given as such."""

from __future__ import annotations

from torch import Tensor

from robustbench_lite.certify.region import Region
from robustbench_lite.core.checks import check_images
from robustbench_lite.core.threats import Lp, Threat

__all__: list[str] = []

INTERVAL_NORMS = ("linf", "l2", "l1")


def input_region(threat_or_box: Threat | tuple[Tensor, Tensor], x: Tensor | None, norms: tuple[str, ...]) -> Region:
    """Return the set of inputs: a box, or a ball of one of these norms cut by the image bounds.

    Raises:
        TypeError: neither a threat nor a pair of tensors.
        ValueError: a threat that bounds cannot start from, images outside its bounds, shapes that differ, NaN, or lower
            above upper.
    """
    if isinstance(threat_or_box, Threat):
        return _threat_region(threat_or_box, x, norms)
    if not isinstance(threat_or_box, (tuple, list)) or len(threat_or_box) != 2:
        raise TypeError(f"expected a threat or a box (lower, upper), got {type(threat_or_box).__name__}")
    if x is not None:
        raise ValueError("x goes with a threat; a box (lower, upper) says all by itself")
    lower, upper = threat_or_box
    _check_box(lower, upper)
    return Region(lower, upper)


def _threat_region(threat: Threat, x: Tensor | None, norms: tuple[str, ...]) -> Region:
    if x is None:
        raise ValueError("a threat is a set around images: give them as x=...")
    if not isinstance(threat, Lp) or threat.norm not in norms:
        raise ValueError(f"these bounds start from Lp threats of norm {', '.join(norms)}; got {threat.name}")
    _check_tensor("x", x)
    check_images(x, threat.bounds)
    x = x.clamp(*threat.bounds)  # by the tolerance of that check at most; no point within the bounds gets farther away
    lower, upper = threat.box(x)
    if threat.norm == "linf":
        return Region(lower, upper)
    eps = threat.radius(x).reshape(-1).expand(len(x))
    return Region(lower, upper, threat.norm, x, eps, threat.per)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {came}")
    if value.ndim != 4:
        raise ValueError(f"{name} must have shape (B, C, H, W), got {tuple(value.shape)}")


def _check_box(lower: Tensor, upper: Tensor) -> None:
    _check_tensor("lower", lower)
    _check_tensor("upper", upper)
    if lower.shape != upper.shape or lower.dtype != upper.dtype or lower.device != upper.device:
        raise ValueError(
            f"lower and upper must agree in shape, dtype and device, got {tuple(lower.shape)} {lower.dtype} "
            f"{lower.device} and {tuple(upper.shape)} {upper.dtype} {upper.device}"
        )
    if not bool((lower.isfinite() & upper.isfinite()).all()):
        raise ValueError("the box must be finite, got NaN or infinity")
    wrong = lower > upper
    if bool(wrong.any()):
        place = tuple(int(i) for i in wrong.nonzero()[0])
        low, high = float(lower[place]), float(upper[place])
        raise ValueError(f"lower must not exceed upper; at {place} lower is {low:g} and upper {high:g}")
