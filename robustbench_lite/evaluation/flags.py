"""Flags: reasons to doubt a result. Each is a pure function that returns its evidence, or nothing.

Those about one look at the model's outputs come with every evaluation (`first_look.py`); those that compare attacks
with each other come from the probe (`probe.py`); `non_finite` comes from the records.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from robustbench_lite.evaluation.unfinished import Unfinished

__all__ = [
    "CONVERGENCE",
    "FLAGS",
    "PROBED",
    "UNFINISHED",
    "Flag",
    "Kind",
    "blind_beats_gradients",
    "excess_rejections",
    "few_samples",
    "frozen_beats_averaged",
    "noise_beats_gradients",
    "non_finite",
    "not_monotone",
    "out_of_reach",
    "probabilities",
    "randomised",
    "restarts_help",
    "single_step_beats_iterative",
    "steps_help",
    "submitted_beats_attacks",
    "unfinished",
    "unstable_gradients",
    "zero_gradients",
]

PROBED = "probed"  # id of the note that the probe was made; it raises nothing
UNFINISHED = "unfinished"
CONVERGENCE = ("steps_help", "restarts_help")  # about the attacks of an evaluation: stronger ones may settle them


@dataclass(frozen=True)
class Flag:
    """A reason to doubt.

    Attributes:
        id: its name in tables.
        evidence: what was seen.
        remedy: what to do about it.
        threat: the name of the threat it is about; "" for all.
        eps: the budget of that threat.
        raised: False for the note that a check was made.
    """

    id: str
    evidence: str
    remedy: str
    threat: str = ""
    eps: float | None = None
    raised: bool = True


@dataclass(frozen=True)
class Kind:
    """What there is to say of a flag without a model: when it is raised, and what to do then."""

    raised_if: str
    remedy: str


FLAGS: dict[str, Kind] = {}
"""Every flag by its id."""

P = ParamSpec("P")


def _flag(remedy: str) -> Callable[[Callable[P, str | None]], Callable[P, Flag | None]]:
    """Make a flag of a function that returns evidence, and list it in `FLAGS`."""

    def make(find: Callable[P, str | None]) -> Callable[P, Flag | None]:
        lines = re.sub(r" \(B[^)]*\)", "", " ".join((find.__doc__ or "").split("Args:")[0].split()))  # no shapes
        FLAGS[find.__name__] = Kind(lines.removeprefix("Raised if "), remedy)

        @wraps(find)
        def flag(*args: P.args, **options: P.kwargs) -> Flag | None:
            evidence = find(*args, **options)
            return None if evidence is None else Flag(find.__name__, evidence, remedy)

        return flag

    return make


@_flag("return logits, before the softmax; or attack the logarithm of the outputs")
def probabilities(outputs: Tensor) -> str | None:
    """Raised if every finite row of the model's outputs (B, K) lies in [0, 1] and sums to 1.

    The softmax saturates: attacks on the cross-entropy of a softmax of a softmax see vanishing gradients.
    """
    rows = outputs[outputs.isfinite().all(dim=1)].double()
    if len(rows) == 0 or rows.shape[1] < 2:
        return None
    if bool(((rows >= 0) & (rows <= 1)).all()) and float((rows.sum(dim=1) - 1).abs().max()) < 1e-4:
        return f"all {len(rows)} outputs looked at lie in [0, 1] and sum to 1"
    return None


@_flag("set stochastic = True on the model: success is then a majority over fresh draws")
def randomised(first: Tensor, second: Tensor, declared: bool) -> str | None:
    """Raised if two calls on the same images gave outputs (B, K) apart by more than rounding, undeclared."""
    if declared:
        return None
    apart = (first.double() - second.double()).abs().nan_to_num(0.0)
    rows = (apart > 1e-4 * first.double().abs().nan_to_num(1.0).clamp_min(1)).any(dim=1)
    if not bool(rows.any()):
        return None
    return f"two calls differ for {int(rows.sum())} of {len(rows)} images, by up to {float(apart.max()):.3g}"


@_flag("give the defense an attack_view (BPDA), or attack without gradients; a saturated loss: attack the margin")
def zero_gradients(gradients: Tensor, loss: str = "margin") -> str | None:
    """Raised if a loss's gradient (B, C, H, W) is exactly zero, or not finite, for more than 5 % of the images."""
    rows = gradients.flatten(1)
    dead = (rows == 0).all(dim=1) | ~rows.isfinite().all(dim=1)
    if float(dead.double().mean()) <= 0.05:
        return None
    return f"the {loss}'s gradient is zero or not finite for {int(dead.sum())} of {len(rows)} clean images"


@_flag("find the overflow or the division by zero; until then these count as errors")
def non_finite(records: pd.DataFrame) -> str | None:
    """Raised if the model answered a finite input with NaN or infinity; such answers count as broken."""
    odd = records["prediction"].to_numpy(dtype="int64", na_value=0) == -2
    bad = records[odd & (records["kind"] != "certifier").to_numpy(dtype=bool)] if odd.any() else records[:0]
    if len(bad) == 0:
        return None
    counts = ", ".join(f"{name}: {count}" for name, count in bad["method"].value_counts(sort=False).items())
    return f"outputs are not finite for {bad['sample_hash'].nunique()} samples ({counts})"


@_flag("evaluate more samples: differences between attacks do not show on so few")
def few_samples(n: int) -> str | None:
    """Raised if attacks were compared on fewer than 25 samples that the model gets right."""
    return f"attacks were compared on {n} samples" if n < 25 else None


@_flag("the gradient misleads: give the defense an attack_view (EOT, BPDA), or attack without gradients")
def unstable_gradients(first: Tensor, second: Tensor) -> str | None:
    """Raised if the margin's gradients (B, C, H, W) 1 % of eps apart have a median cosine below 0.5.

    Args:
        first: gradients at the images.
        second: gradients beside them.
    """
    one, two = (part.flatten(1).double() for part in (first, second))
    alive = (one.norm(dim=1) > 0) & (two.norm(dim=1) > 0) & one.isfinite().all(dim=1) & two.isfinite().all(dim=1)
    if not bool(alive.any()):
        return None  # `zero_gradients` says so
    cosine = float(((one * two).sum(dim=1) / (one.norm(dim=1) * two.norm(dim=1)))[alive].median())
    return f"the median cosine of gradients 1 % of eps apart is {cosine:.2f}" if cosine < 0.5 else None


@_flag("gradients are masked at a distance: attack from many starts, by another loss, and without gradients")
def single_step_beats_iterative(single: Tensor, iterative: Tensor) -> str | None:
    """Raised if one step breaks samples (B,) that many steps do not: more than 2, and than 2 %."""
    return _missed(single, iterative, "one step breaks {} of {} samples that many steps leave standing")


@_flag("gradients are masked: trust the attack that needs none, with more queries; give the defense an attack_view")
def blind_beats_gradients(blind: Tensor, gradients: Tensor, names: Tensor) -> str | None:
    """Raised if Square breaks samples (B,) that no attack with gradients does: more than 2, and than 2 %.

    Args:
        blind: which samples fell to the attack without gradients.
        gradients: which fell to any attack with gradients.
        names: the samples' indices in the data set.
    """
    return _missed_by_gradients("Square", blind, gradients, names)


@_flag("gradients are masked: attack without them, and give the defense an attack_view")
def noise_beats_gradients(noise: Tensor, gradients: Tensor, names: Tensor) -> str | None:
    """Raised if random noise breaks samples (B,) that no attack with gradients does: more than 2, and than 2 %.

    Args:
        noise: which samples fell to the noise.
        gradients: which fell to any attack with gradients.
        names: the samples' indices in the data set.
    """
    return _missed_by_gradients("random noise", noise, gradients, names)


@_flag("averaged gradients are too noisy to follow: more draws in the attack_view, more steps")
def frozen_beats_averaged(frozen: Tensor, gradients: Tensor, names: Tensor) -> str | None:
    """Raised if PGD on frozen draws breaks samples (B,) that no other gradient does: more than 2, and than 2 %.

    Args:
        frozen: which samples fell to gradients of a randomised model whose draws were frozen.
        gradients: which fell to any attack with fresh draws.
        names: the samples' indices in the data set.
    """
    return _missed_by_gradients("PGD on frozen draws", frozen, gradients, names)


@_flag("a larger budget contains the smaller: the attacks at the larger one are too weak; more steps, more restarts")
def not_monotone(smaller: Tensor, larger: Tensor) -> str | None:
    """Raised if samples (B,) fall at half of eps, but not at eps: more than 2, and than 2 %."""
    return _missed(smaller, larger, "{} of {} samples fall at half of eps, but not at eps")


@_flag("a budget that allows every image must break every sample: gradients are masked")
def out_of_reach(vast: Tensor) -> str | None:
    """Raised if samples (B,) withstand a budget that allows every image: more than 2, and than 2 %."""
    return _missed(~vast, vast, "{} of {} samples withstand a budget that allows every image")


@_flag("the attacks have not converged: add steps until the figure no longer falls")
def steps_help(reported: Tensor, longer: Tensor) -> str | None:
    """Raised if PGD with 160 steps breaks samples (B,) that the evaluation left standing: more than 2, and than 2 %."""
    return _missed(longer, reported, "160 steps break {} of {} samples that the evaluation left standing")


@_flag("the attacks have not converged: add restarts until the figure no longer falls")
def restarts_help(reported: Tensor, restarted: Tensor) -> str | None:
    """Raised if PGD with 5 restarts breaks samples (B,) that the evaluation left standing: more than 2, and 2 %."""
    return _missed(restarted, reported, "5 restarts break {} of {} samples that the evaluation left standing")


@_flag("a detector must accept what a file format or a camera does to clean images: state its accuracy on such images")
def excess_rejections(clean: Tensor, noisy: Tensor, rounded: Tensor) -> str | None:
    """Raised if a detector rejects 5 % more of the images (B,) after random noise in the threat, or after rounding.

    Args:
        clean: which clean images it rejects.
        noisy: which images with noise.
        rounded: which images rounded to 8 bits.
    """
    before, *after = (float(part.double().mean()) for part in (clean, noisy, rounded))
    if max(after) <= before + 0.05:
        return None
    return f"rejects {before:.1%} of clean images, {after[0]:.1%} of noisy and {after[1]:.1%} of rounded ones"


@_flag("run again: rows that are there are kept, the others computed; with more time or budget, or the error mended")
def unfinished(open_: Unfinished) -> str | None:
    """Raised if a method has no answer about some samples: it was cut off, not run for lack of budget, or failed."""
    return str(open_)


@_flag("the attacks are too weak: add the one that made these examples, or a suite that finds them")
def submitted_beats_attacks(indices: list[int]) -> str | None:
    """Raised if examples that somebody handed in break samples which every attack of the evaluation left standing."""
    if not indices:
        return None
    shown = ", ".join(map(str, indices[:20])) + (" ..." if len(indices) > 20 else "")
    return f"submitted examples break {len(indices)} samples that the attacks left standing: {shown}"


def _missed_by_gradients(what: str, falls: Tensor, gradients: Tensor, names: Tensor) -> str | None:
    found = _missed(falls, gradients, what + " breaks {} of {} samples that gradients leave standing")
    return None if found is None else f"{found}: {_listed(names[falls & ~gradients])}"


def _listed(names: Tensor) -> str:
    shown = ", ".join(str(name) for name in names[:20].tolist())
    return shown + (" ..." if len(names) > 20 else "")


def _missed(weak: Tensor, strong: Tensor, text: str) -> str | None:
    """Say how many samples fell to the weak attack alone, where it is more than chance would have it."""
    count, n = int((weak & ~strong).sum()), len(weak)
    return text.format(count, n) if count > max(2, 0.02 * n) else None
