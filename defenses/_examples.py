"""What objectives that learn from adversarial examples share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.threats import Lp, Threat
from robustbench_lite.defenses.ramps import check_ramp

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.core.goals import Goal
    from robustbench_lite.core.rng import Streams
    from robustbench_lite.defenses.base import Batch

__all__ = ["check_examples", "check_weight", "examples", "logits_of", "part_of"]


def check_examples(attack: Attack, threat: Threat, warmup: float, ramp: float) -> None:
    """Check that the attack can search the threat, with an eps that may rise.

    Raises:
        ValueError: a ramp that does not fit, or a threat without one number as its eps or beyond the attack.
    """
    check_ramp(warmup, ramp)
    if isinstance(threat, Lp) and (threat.eps is None or isinstance(threat.eps, Tensor)):
        raise ValueError(f"adversarial training needs a threat whose eps is one number, got {threat}")
    if ramp > 0 and not isinstance(threat, Lp):
        raise ValueError(f"only the eps of an Lp threat can be ramped, got {threat}; use ramp=0")
    if not attack.supports(threat):
        raise ValueError(f"{attack} does not support the threat {threat}")


def check_weight(name: str, value: float) -> None:
    """Check the weight of a term of a loss.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} is the weight of a term of the loss, >= 0 and finite, got {value:g}")


def part_of(threat: Threat, share: float) -> Threat:
    """Return the threat with this share of its eps; a threat that is no Lp ball as it is."""
    if share < 1 and isinstance(threat, Lp):
        return threat.resized(share * parse_number(threat.eps))  # type: ignore[arg-type]
    return threat


def examples(
    attack: Attack, model: nn.Module, batch: Batch, threat: Threat, streams: Streams, goal: Goal | None = None
) -> Tensor:
    """Return what the attack finds around a batch, images (B, C, H, W) without a graph.

    The attack meets the model in eval mode, runs to the end on every sample, and keeps each sample's highest loss,
    among its successes where it has any.

    Args:
        attack: what searches.
        model: what it searches against.
        batch: the clean images.
        threat: where it searches.
        streams: those of the step; their root seeds the attack.
        goal: what counts as success; None: any wrong label.
    """
    generator = torch.Generator().manual_seed(streams.root)
    aim = batch.y if goal is None else goal
    found = attack(model, batch.x, aim, threat, stop="never", indices=batch.indices, generator=generator)
    return found.x_adv.detach()


def logits_of(model: nn.Module, *images: Tensor) -> tuple[Tensor, ...]:
    """Return the logits of several batches of one size, float32, by one pass.

    BatchNorm then sees the mixture that it must serve.
    """
    return model(torch.cat(images)).float().chunk(len(images))  # type: ignore[no-any-return]
