"""What the harness adds: `evaluate`, with a store, and its methods called by hand on the same batches, in turn.

By hand means: the clean forward pass, each attack and each certifier, called with the same samples, names and seeds,
and nothing kept. `evaluate` also looks at the model first, asks it again about every returned input, measures
distances, hashes, audits, makes flags, and writes rows and examples to a fresh folder. A seeded draw, one process, one
thread, CPU seconds. Both must have found the same. Two ratios, each with its range over the rounds:

- apart: `evaluate` over the methods by hand, which take turns, so that the median over rounds says little where the
  processor's speed changes from one second to the next;
- within: `evaluate` over what its own calls of the methods took meanwhile, and the clean passes by hand.

    RBL_DATA=... python benchmarks/overhead.py --entries digits/pgd_at mnist/ibp_0.3 --images 500

An allocator that gives memory back and asks for it again makes system time that has to do with neither of the two. With
glibc, MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000 in the environment make it keep what it has,
and the ratios steadier.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from nets import DATA
from torch import nn

from robustbench_lite.attacks import FGSM, NES, PGD, AutoAttack, RandomNoise
from robustbench_lite.attacks.base import Attack
from robustbench_lite.certify import CROWNIBP, Cascade
from robustbench_lite.certify.base import Certifier
from robustbench_lite.core.goals import Untargeted
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation import evaluate
from robustbench_lite.evaluation.samples import Samples, as_samples
from robustbench_lite.evaluation.units import cut
from robustbench_lite.zoo import load_defense

SUITES: dict[str, tuple[list[Attack], list[Certifier]]] = {
    "quick": (
        [RandomNoise(draws=20), FGSM(), PGD(steps=40, loss="margin")],
        [Cascade(falsifier=PGD(steps=10, loss="margin"))],
    ),
    "standard": ([RandomNoise(), AutoAttack(), NES()], [CROWNIBP()]),
}
EPS = {"digits": 0.1, "mnist": 0.3}


@dataclass
class Clock:
    """CPU seconds of the outermost calls of what it watches; a method may call another."""

    seconds: float = 0.0
    depth: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        start, self.depth = time.process_time(), self.depth + 1
        try:
            yield
        finally:
            self.depth -= 1
            self.seconds += 0.0 if self.depth else time.process_time() - start

    def watching(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that is counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return call(*args, **kwargs)

        return counted


@dataclass(frozen=True)
class Round:
    """CPU seconds: the methods by hand, `evaluate`, and what `evaluate` spent in the methods."""

    hand: float
    whole: float
    methods: float


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", nargs="+", default=["digits/pgd_at"])
    parser.add_argument("--suites", nargs="+", default=["quick"], choices=list(SUITES))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=5, help="pairs, after one that warms up")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    print("entry            suite      by hand   evaluate   apart                  within")
    for entry in options.entries:
        name = entry.partition("/")[0]
        model = load_defense(entry, data_dir=DATA).eval()
        data = load_data(name, data_dir=DATA).sample(options.images, seed=0)
        for suite in options.suites:
            rounds = _rounds(model, data, Lp("linf", EPS[name]), suite, options.batch, options.rounds)
            hand, whole = statistics.median(r.hand for r in rounds), statistics.median(r.whole for r in rounds)
            apart, within = _spread([r.whole / r.hand for r in rounds]), _spread([r.whole / r.methods for r in rounds])
            print(f"{entry:16s} {suite:9s} {hand:7.2f} s {whole:8.2f} s   {apart}   {within}", flush=True)


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"


def _rounds(model: nn.Module, data: Dataset, threat: Lp, suite: str, batch: int, rounds: int) -> list[Round]:
    """Return the seconds of each round."""
    attacks, certifiers = SUITES[suite]
    done = []
    for number in range(rounds + 1):
        clean, clock = Clock(), Clock()
        found, hand = _timed(lambda clean=clean: _by_hand(model, data, threat, attacks, certifiers, batch, clean))
        with tempfile.TemporaryDirectory() as store, _watched(clock):
            given = {"store": store, "batch_size": batch, "adaptive": False, "device": "cpu"}
            report, whole = _timed(lambda given=given: evaluate(model, data, threat, attacks, certifiers, **given))
        rows = report.records
        attacked = rows[rows["kind"] == "attack"].groupby("method", sort=False)["success"]
        right = [int(rows["correct"][rows["kind"] == "clean"].sum()), *map(int, attacked.sum())]
        right += [int(rows["certified"].sum())]
        if right != found:
            raise RuntimeError(f"by hand {found}, in the report {right}")
        if number:
            done.append(Round(hand, whole, clock.seconds + clean.seconds))
    return done


@contextmanager
def _watched(clock: Clock) -> Iterator[None]:
    """Count all calls of attacks and certifiers."""
    with (
        mock.patch.object(Attack, "__call__", clock.watching(Attack.__call__)),
        mock.patch.object(Certifier, "__call__", clock.watching(Certifier.__call__)),
    ):
        yield


def _by_hand(
    model: nn.Module,
    data: Dataset,
    threat: Lp,
    attacks: list[Attack],
    certifiers: list[Certifier],
    batch: int,
    clean: Clock,
) -> list[int]:
    """Return how many are right, fall to each attack, are proven by the certifiers together (there is one)."""
    right, proven, fallen = 0, 0, [0] * len(attacks)
    for part in _batches(data, threat, batch):
        x, y, names = part.x, part.y, torch.from_numpy(part.indices)
        with clean.running(), torch.no_grad():
            right += int((model(x).argmax(dim=1) == y).sum())
        for place, attack in enumerate(attacks):
            result = attack(model, x, Untargeted(y), threat, indices=names, generator=_seeded())
            fallen[place] += int(result.success.sum())
        for certifier in certifiers:
            found = certifier(model, x, y, threat, indices=names, generator=_seeded())
            proven += int((found.certified & (found.prediction == y)).sum())
    return [right, *fallen, proven]


def _batches(data: Dataset, threat: Lp, batch: int) -> Iterator[Samples]:
    """Yield the batches that an evaluation cuts."""
    for unit in cut(as_samples(data, threat.bounds).in_batches(batch)):
        for number in np.unique(unit.batch):
            yield unit.take(unit.batch == number)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


if __name__ == "__main__":
    main()
