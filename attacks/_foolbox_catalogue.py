"""What the attacks of foolbox 3.3.4 search, see and need, and which of them are refused and why.

A table rather than introspection: names, access and threats can be asked without the second that importing foolbox
takes. A test compares it with the installed foolbox, class by class. Evidence is cited as file: expression.
"""

from __future__ import annotations

from dataclasses import dataclass

from robustbench_lite.core.errors import suggest
from robustbench_lite.core.oracle import Access

__all__ = ["ALIASES", "ATTACKS", "REFUSED", "Entry", "find"]

ANY = ("linf", "l2", "l1", "l0")


@dataclass(frozen=True)
class Entry:
    """One attack class of foolbox.

    Attributes:
        norms: the Lp norms it searches; all four where foolbox leaves the distance to the caller.
        access: what it sees of the model.
        fixed: it needs a budget; otherwise it looks for the nearest adversarial example.
        goals: "any", "untargeted" or "targeted".
        starts: it walks from an adversarial start, which it may not find.
        unit_bounds: it clips images to [0, 1], whatever the bounds.
        needs: a package that foolbox itself does not install.
    """

    norms: tuple[str, ...]
    access: Access = Access.LABEL
    fixed: bool = False
    goals: str = "any"
    starts: bool = False
    unit_bounds: bool = False
    needs: str | None = None


def _descent(norm: str, goals: str = "any") -> Entry:
    return Entry((norm,), Access.GRADIENT, fixed=True, goals=goals)


def _minimum(norm: str, goals: str = "any") -> Entry:
    return Entry((norm,), Access.GRADIENT, goals=goals)


def _noise(norm: str) -> Entry:
    return Entry((norm,), fixed=True)


def _walk(norm: str) -> Entry:
    return Entry((norm,), Access.GRADIENT, starts=True, needs="numba")


ATTACKS: dict[str, Entry] = {
    "L1ProjectedGradientDescentAttack": _descent("l1"),
    "L2ProjectedGradientDescentAttack": _descent("l2"),
    "LinfProjectedGradientDescentAttack": _descent("linf"),
    "L1AdamProjectedGradientDescentAttack": _descent("l1"),
    "L2AdamProjectedGradientDescentAttack": _descent("l2"),
    "LinfAdamProjectedGradientDescentAttack": _descent("linf"),
    "L1BasicIterativeAttack": _descent("l1"),
    "L2BasicIterativeAttack": _descent("l2"),
    "LinfBasicIterativeAttack": _descent("linf"),
    "LinfAdamBasicIterativeAttack": _descent("linf"),
    "L1FastGradientAttack": _descent("l1", "untargeted"),
    "L2FastGradientAttack": _descent("l2", "untargeted"),
    "LinfFastGradientAttack": _descent("linf", "untargeted"),
    "SparseL1DescentAttack": _descent("l1"),
    # deepfool.py never reads the target: a targeted criterion would only say when to stop.
    "L2DeepFoolAttack": _minimum("l2", "untargeted"),
    "LinfDeepFoolAttack": _minimum("linf", "untargeted"),
    "DDNAttack": _minimum("l2"),
    "L2CarliniWagnerAttack": _minimum("l2"),
    "EADAttack": _minimum("l1"),
    "L1FMNAttack": _minimum("l1"),
    "LInfFMNAttack": _minimum("linf"),
    "L0BrendelBethgeAttack": _walk("l0"),
    "L1BrendelBethgeAttack": _walk("l1"),
    "L2BrendelBethgeAttack": _walk("l2"),
    "LinfinityBrendelBethgeAttack": _walk("linf"),
    "L2ContrastReductionAttack": _noise("l2"),
    "L2AdditiveGaussianNoiseAttack": _noise("l2"),
    "L2AdditiveUniformNoiseAttack": _noise("l2"),
    "L2ClippingAwareAdditiveGaussianNoiseAttack": _noise("l2"),
    "L2ClippingAwareAdditiveUniformNoiseAttack": _noise("l2"),
    "LinfAdditiveUniformNoiseAttack": _noise("linf"),
    "L2RepeatedAdditiveGaussianNoiseAttack": _noise("l2"),
    "L2RepeatedAdditiveUniformNoiseAttack": _noise("l2"),
    "L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack": _noise("l2"),
    "L2ClippingAwareRepeatedAdditiveUniformNoiseAttack": _noise("l2"),
    # gen_attack.py: apply_noise ends in clip(x + noise, 0.0, 1.0), and run accepts TargetedMisclassification alone.
    "GenAttack": Entry(("linf",), Access.SCORES, fixed=True, goals="targeted", unit_bounds=True),
    "SaltAndPepperNoiseAttack": Entry(("l2",)),
    "BoundaryAttack": Entry(("l2",), starts=True),
    # hop_skip_jump.py: clip(..., 0, 1) thrice. The direction is divided by the norm of the whole batch
    # (ep.norms.l2 without axis), which does no harm to one sample at a time. Norm: its option "constraint".
    "HopSkipJumpAttack": Entry(("l2", "linf"), starts=True, unit_bounds=True),
    "InversionAttack": Entry(ANY),
    "BinarySearchContrastReductionAttack": Entry(ANY),
    "LinearSearchContrastReductionAttack": Entry(ANY),
    "GaussianBlurAttack": Entry(ANY),
    "LinearSearchBlendedUniformNoiseAttack": Entry(ANY),
    "PointwiseAttack": Entry(ANY, starts=True),
}

ALIASES: dict[str, str] = {
    "FGM": "L2FastGradientAttack",
    "FGSM": "LinfFastGradientAttack",
    "L1PGD": "L1ProjectedGradientDescentAttack",
    "L2PGD": "L2ProjectedGradientDescentAttack",
    "LinfPGD": "LinfProjectedGradientDescentAttack",
    "PGD": "LinfProjectedGradientDescentAttack",
    "L1AdamPGD": "L1AdamProjectedGradientDescentAttack",
    "L2AdamPGD": "L2AdamProjectedGradientDescentAttack",
    "LinfAdamPGD": "LinfAdamProjectedGradientDescentAttack",
    "AdamPGD": "LinfAdamProjectedGradientDescentAttack",
}

# mi_fgsm.py: the optimiser is given gradients that normalize() has already turned into signs (linf) or unit vectors.
_MOMENTUM = (
    "it is not the paper's attack: momentum gathers signs (linf) or unit vectors of the norm (l1, l2) where the paper "
    "gathers gradients over their l1 norm; write momentum as an update of our own iterative attacks"
)
# basic_iterative_method.py: only LinfAdamBasicIterativeAttack overrides get_optimizer.
_NO_ADAM = "it never uses Adam: the class does not override get_optimizer, and its Adam options have no effect; use {}"
# gradient_estimators.py: gradient += (pos_loss - neg_loss) * noise, where loss_fn is summed over the batch.
_ESTIMATOR = (
    "the estimator multiplies each sample's noise by the loss of the whole batch, and its scale is off by four; use "
    "an attack of ours with a gradient estimator"
)

REFUSED: dict[str, str] = {
    # fast_minimum_norm.py, L2FMNAttack.project: factor = minimum(1, norms / norms), which is 1.
    "L2FMNAttack": "its projection does nothing (it divides the norm by itself instead of eps by the norm); use "
    "DDNAttack or L2CarliniWagnerAttack for l2",
    # fast_minimum_norm.py, L0FMNAttack.project: sorted[rows, epsilon] is entry eps + 1, and >= keeps it.
    "L0FMNAttack": "its projection keeps eps + 1 entries, and all entries where ties abound, and it fails with an "
    "IndexError once eps reaches the number of entries; use L0BrendelBethgeAttack or PointwiseAttack for l0",
    # newtonfool.py: delta / gradients_l2_norm.square(), 0 / 0 where the gradient vanishes.
    "NewtonFoolAttack": "it returns NaN images where a gradient is zero (0 / 0), and divides by the fourth power of "
    "the gradient's norm; use L2DeepFoolAttack",
    "L1MomentumIterativeFastGradientMethod": _MOMENTUM,
    "L2MomentumIterativeFastGradientMethod": _MOMENTUM,
    "LinfMomentumIterativeFastGradientMethod": _MOMENTUM,
    "MIFGSM": _MOMENTUM,
    "L1AdamBasicIterativeAttack": _NO_ADAM.format("L1AdamProjectedGradientDescentAttack(random_start=False)"),
    "L2AdamBasicIterativeAttack": _NO_ADAM.format("L2AdamProjectedGradientDescentAttack(random_start=False)"),
    # additive_noise.py, LinfMixin: norms = flatten(p).max(), not of abs(p); the repeats judge the oversized points.
    "LinfRepeatedAdditiveUniformNoiseAttack": "it scales noise by the largest entry instead of the largest absolute "
    "one, so that half of its draws leave the ball, and it stops at such a draw; use RandomNoise",
    # virtual_adversarial_attack.py: x + d with |d| = xi = 1e-6. On random 6 x 6 images 4 % of the answers were NaN.
    "VirtualAdversarialAttack": "its probe of l2 length 1e-6 drowns in float32 rounding, which gives NaN images now "
    "and then, and an exception where a gradient is zero; use L2ProjectedGradientDescentAttack",
    # spatial_attack.py: derives from Attack, without distance or epsilon.
    "SpatialAttack": "it has no distance and ignores eps; use the threat RotationTranslation with an attack of ours",
    # dataset_attack.py: for i in range(batch_size - 1), nothing for one sample; inputs come by feed().
    "DatasetAttack": "it swaps the images of a batch after feed(), which is no search around one image",
    # binarization.py: raises without starting_points.
    "BinarizationRefinementAttack": "it refines adversarial examples of another attack and cannot search by itself",
    "Attack": "it is a base class",
    "es_gradient_estimator": _ESTIMATOR,
    "evolutionary_strategies_gradient_estimator": _ESTIMATOR,
}


def find(name: str) -> tuple[str, Entry]:
    """Return an attack's class name (aliases resolved) and its entry.

    Raises:
        ValueError: a refused attack, with the reason, or an unknown one, with the nearest known name.
    """
    reason = _ESTIMATOR if name.endswith("WithESGradientEstimator") else REFUSED.get(name)
    if reason is not None:
        raise ValueError(f"foolbox's {name} is refused: {reason}")
    full = ALIASES.get(name, name)
    if full not in ATTACKS:
        raise ValueError(suggest(name, [*ATTACKS, *ALIASES], "foolbox attack"))
    return full, ATTACKS[full]
