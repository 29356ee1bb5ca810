"""The probe: attacks against each other on a few samples, whatever the suite holds.

A cascade hides how attacks compare, and a suite may hold one alone. The probe attacks up to 256 samples, drawn by seed
from those that the model gets right, with noise, with one step, with forty steps from a random start under the margin
loss, with four times as many steps, with five restarts, without gradients (Square), at half of the budget, at a budget
that allows every image, and on frozen draws where the model is randomised; looks at gradients and, of a detector, at
rejections; and asks whether any of it breaks what the evaluation left standing. What it finds are flags, and a note
that it was made. None of its rows is kept: it says whether a figure can be trusted, it is not part of it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from robustbench_lite.attacks import FGSM, PGD, Frozen, RandomNoise, Square
from robustbench_lite.core.goals import Untargeted
from robustbench_lite.core.models import ABSTAIN, Model, rejects
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat
from robustbench_lite.evaluation import flags as judge
from robustbench_lite.evaluation.first_look import margin_gradients
from robustbench_lite.evaluation.flags import PROBED, Flag
from robustbench_lite.evaluation.samples import Samples
from robustbench_lite.evaluation.scarcity import in_chunks
from robustbench_lite.evaluation.subject import Subject

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack

__all__ = ["probe"]

SAMPLES = 256
STEPS = 40


def probe(subject: Subject, samples: Samples, threat: Threat, fallen: set[int], seed: int) -> list[Flag]:
    """Return the flags that a comparison of attacks raises, and a note that it was made.

    Nothing is returned for a threat that the attacks do not support (they do linf, l2 and l1 balls), for a budget of 0,
    or where the model gets no sample right.

    Args:
        subject: the model.
        samples: of which the probe draws.
        threat: with a budget.
        fallen: indices of the samples that the evaluation's attacks brought down under this threat.
        seed: of the draw, and of all randomness.
    """
    if not isinstance(threat, Lp) or not PGD().supports(threat) or not threat.size:
        return []
    part = samples.take(np.sort(np.argsort(samples.lots("probe", seed))[:SAMPLES]))
    with subject.seeded(seed):
        right, _ = subject.answer(subject.images(part.x), part.y.to(subject.device))
        part = part.take((right.cpu() == part.y).numpy())
        if len(part) == 0:
            return []
        found = [
            judge.few_samples(len(part)),
            *_compared(_Trials(subject, part, threat, seed), fallen),
            *_steadiness(subject, part, threat, seed),
        ]
        found += _rejections(subject, part, threat, seed) if rejects(subject.model) else []
    note = Flag(PROBED, f"{len(part)} samples, seed {seed}", "", raised=False)
    return [replace(flag, threat=threat.name, eps=threat.size) for flag in [note, *found] if flag is not None]


class _Trials:
    """Runs attacks on the same samples."""

    def __init__(self, subject: Subject, part: Samples, threat: Lp, seed: int) -> None:
        self.subject, self.part, self.threat, self.seed = subject, part, threat, seed
        self.names = torch.from_numpy(part.indices)

    def falls(self, attack: Attack, eps: float | None = None, view: Model | None = None) -> Tensor:
        """Return which samples (B,) fall, on the CPU; at another budget, or by another view, if one is given."""
        threat = self.threat if eps is None else self.threat.resized(eps)

        def ask(rows: slice) -> Tensor:
            result = attack(
                self.subject.model,
                self.subject.images(self.part.x[rows]),
                Untargeted(self.part.y[rows].to(self.subject.device)),
                threat,
                view=view or self.subject.view,
                indices=self.names[rows],
                generator=torch.Generator().manual_seed(self.seed),
            )
            return result.success.cpu()

        return in_chunks(ask, len(self.part))

    def frozen(self, attack: Attack) -> Tensor:
        """Return which samples (B,) fall where the randomness stands still while the attack searches."""
        return self.falls(attack, view=Frozen(self.subject.view or self.subject.model, self.seed))

    @property
    def whole_range(self) -> float:
        """The budget that allows every image."""
        low, high = self.threat.bounds
        numbers = float(self.part.x[0].numel())
        return (high - low) * {"linf": 1.0, "l2": math.sqrt(numbers), "l1": numbers}[self.threat.norm]


def _compared(trials: _Trials, fallen: set[int]) -> list[Flag | None]:
    attack = PGD(steps=STEPS, loss="margin")
    reported = torch.tensor([index in fallen for index in trials.names.tolist()])
    single, base, longer = (trials.falls(one) for one in (FGSM(), attack, replace(attack, steps=4 * STEPS)))
    restarted = base | trials.falls(replace(attack, restarts=5))
    iterative, noise = base | longer | restarted, trials.falls(RandomNoise(draws=100))
    gradients = iterative | single
    square = Square(queries=500)
    blind = trials.falls(square) if square.supports(trials.threat) else torch.zeros_like(noise)
    frozen = trials.frozen(attack) if trials.subject.stochastic else torch.zeros_like(noise)
    half = trials.falls(attack, float(trials.threat.size or 0.0) / 2)
    return [
        judge.noise_beats_gradients(noise, gradients, trials.names),
        judge.blind_beats_gradients(blind, gradients, trials.names),
        judge.frozen_beats_averaged(frozen, gradients, trials.names),
        judge.single_step_beats_iterative(single, iterative),
        judge.steps_help(reported, longer),
        judge.restarts_help(reported, restarted),
        judge.not_monotone(half, gradients | reported),
        judge.out_of_reach(trials.falls(replace(attack, restarts=2), trials.whole_range)),
    ]


def _steadiness(subject: Subject, part: Samples, threat: Lp, seed: int) -> list[Flag | None]:
    """Compare gradients at the images with those a hundredth of the budget beside them."""
    x, y = subject.images(part.x), part.y.to(subject.device)
    beside = replace(threat, eps=0.01 * float(threat.size or 0.0)).random_point(x, _streams(part, x, seed))
    return [judge.unstable_gradients(margin_gradients(subject, x, y), margin_gradients(subject, beside, y))]


def _rejections(subject: Subject, part: Samples, threat: Lp, seed: int) -> list[Flag | None]:
    x, y = subject.images(part.x), part.y.to(subject.device)
    low, high = threat.bounds
    noisy = threat.random_point(x, _streams(part, x, seed))
    rounded = ((x - low) / (high - low) * 255).round() / 255 * (high - low) + low
    refused = [subject.answer(images, y)[0].cpu() == ABSTAIN for images in (x, noisy, rounded)]
    return [judge.excess_rejections(refused[0], refused[1], refused[2])]


def _streams(part: Samples, x: Tensor, seed: int) -> Streams:
    return Streams.from_generator(torch.Generator().manual_seed(seed), torch.from_numpy(part.indices), x.device)
