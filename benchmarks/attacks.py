"""How fast our attacks are beside those of other libraries, in one process, in turn, on the same nets and images.

    pip install -e '.[bench]'
    RBL_DATA=... OMP_NUM_THREADS=1 python benchmarks/attacks.py [--rows pgd,restarts,curve,apgd,square,grid,auto]
    python benchmarks/attacks.py --device cuda --wide [--fast bf16|channels_last|compile|all]

Each line: the median over paired runs, each pair with a seed of its own, of peer time / our time, our milliseconds, and
of the last pair the share of samples that still stand after each, and McNemar's exact p-value for the difference
between what the two found. `bound` is the ratio if our attack took no time beside the net's forward passes: for attacks
without gradients on a CPU the most that can be had. `--share 0.01`: budgets so small that nobody falls; the ratio is
then that of the time for a step of a sample. Times on a CPU are those of the process (other work on the machine does
not count), on a GPU those of CUDA events. A peer that is not installed is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from nets import Subject, subjects, wide_resnet
from peers import PEERS, Found
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from torch import Tensor

from robustbench_lite.attacks import APGD, PGD, AutoAttack, Fast, QuickAutoAttack, RotationTranslationGrid, Square
from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.security_curve import security_curve
from robustbench_lite.core.models import predict
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp, Threat

FAST = {
    "bf16": {"dtype": torch.bfloat16},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
    "all": {"dtype": torch.bfloat16, "channels_last": True, "compile": True},
}
CURVE = 8  # budgets of a security curve, evenly spaced up to the subject's


@dataclass(frozen=True)
class Row:
    """One kind of work: what we run, which peers do the same, on which nets, and how many images at most."""

    name: str
    ours: Callable[[Subject, int], Found]
    peers: tuple[str, ...]
    wanted: Callable[[Subject], bool] = lambda subject: True
    images: int = 1 << 30


def attack(
    method: Attack, threat: Callable[[Subject], Threat] = lambda s: Lp("linf", s.eps)
) -> Callable[[Subject, int], Found]:
    """Return a run of one of our attacks, by subject and seed, that gives the images it ends with."""
    return lambda s, seed: method(s.model, s.x, s.y, threat(s), view=s.view, generator=_seeded(seed)).x_adv


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def curve(s: Subject, seed: int) -> Found:
    """Run our security curve; a sample falls at the largest budget or before."""
    budgets = [s.eps * (i + 1) / CURVE for i in range(CURVE)]
    threat, given = Lp("linf", s.eps), {"eps": budgets, "view": s.view, "generator": _seeded(seed)}
    found = security_curve(PGD(steps=40), s.model, s.x, s.y, threat, **given)
    return found.success[-1]


ROWS = {
    "pgd": Row("PGD-40", attack(PGD(steps=40)), ("foolbox pgd", "torchattacks pgd", "art pgd")),
    "restarts": Row(
        "PGD-40 x 5", attack(PGD(steps=40, restarts=5)), ("foolbox restarts",), wanted=lambda s: not s.defended
    ),
    "curve": Row(f"{CURVE}-point curve", curve, ("foolbox curve",), wanted=lambda s: s.defended),
    "apgd": Row("APGD-100 CE", attack(APGD(steps=100, loss="ce")), ("torchattacks apgd", "pyautoattack apgd")),
    "square": Row("Square, 1,000", attack(Square(queries=1000)), ("torchattacks square", "pyautoattack square")),
    "grid": Row(
        "grid, 775 points",
        attack(RotationTranslationGrid(), lambda s: RotationTranslation()),
        ("foolbox grid",),
        images=64,
    ),
    "auto": Row("AutoAttack", attack(AutoAttack()), ("pyautoattack standard",), wanted=lambda s: s.defended),
    "quick": Row("QuickAutoAttack", attack(QuickAutoAttack()), ("pyautoattack standard",)),
}


def timed(run: Callable[[], Found], device: str) -> tuple[float, Found]:
    """Return the seconds that `run` takes, and what it gives."""
    if device == "cpu":
        start = time.process_time()
        found = run()
        return time.process_time() - start, found
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    found = run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000, found


@contextmanager
def passes(s: Subject) -> Iterator[list[float]]:
    """Yield a list that takes in the process seconds of each forward pass of the net."""
    seconds: list[float] = []
    handles = [
        s.model.register_forward_pre_hook(lambda *_: seconds.append(-time.process_time())),
        s.model.register_forward_hook(lambda *_: seconds.append(seconds.pop() + time.process_time())),
    ]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def fallen(found: Found, s: Subject) -> Tensor:
    """Return bool (N,): which samples a run has broken."""
    if found.dtype == torch.bool:
        return found
    with torch.no_grad():
        return predict(s.model, found) != s.y


def compare(row: Row, s: Subject, peer: str, repeat: int, device: str) -> list[str]:
    """Run both in turn, `repeat` times after a first time that warms up, and return a line of the table."""
    theirs = PEERS[peer]
    ratios, bounds, ms, found = [], [], [], {}
    bounded = device == "cpu" and s.view is None  # a hook would break up a compiled net
    for number in range(repeat + 1 if repeat > 1 else 1):
        torch.manual_seed(number)
        np.random.seed(number)
        with passes(s) if bounded else nullcontext([]) as forward:
            own_time, found["ours"] = timed(lambda seed=number: row.ours(s, seed), device)
        peer_time, found["theirs"] = timed(lambda seed=number: theirs(s, seed), device)
        if number or repeat == 1:
            ratios.append(peer_time / own_time)
            bounds += [peer_time / sum(forward)] if bounded else []
            ms.append(1000 * own_time)
    own, other = fallen(found["ours"], s), fallen(found["theirs"], s)
    only, missed = int((own & ~other).sum()), int((other & ~own).sum())
    p = binomtest(only, only + missed).pvalue if only + missed else 1.0
    stand = [f"{100 * (1 - f.double().mean().item()):.1f}" for f in (own, other)]
    return [
        row.name,
        s.name,
        peer,
        f"{statistics.median(ratios):.2f}",
        f"{statistics.median(bounds):.2f}" if bounded else "-",
        f"{statistics.median(ms):.0f}",
        *stand,
        f"{p:.2g}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="pgd,restarts,curve,apgd,square,grid", help="of: " + ", ".join(ROWS))
    parser.add_argument("--nets", default="", help="only nets whose name contains this")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--wide", action="store_true", help="a WideResNet-28-10 in place of the small nets")
    parser.add_argument("--share", type=float, default=1.0, help="of the budgets; at 0.01 nobody falls")
    parser.add_argument("--fast", choices=FAST, help="our side searches in this mode, and decides in float32")
    options = parser.parse_args()
    table = Table("work", "net", "peer", "peer / ours", "bound", "ours (ms)", "stand (ours)", "stand (peer)", "p")
    nets = [wide_resnet(options.images, options.device)] if options.wide else subjects(options.images, options.device)
    nets = [replace(s, eps=options.share * s.eps) for s in nets if options.nets in s.name]
    if options.fast:
        nets = [replace(s, view=Fast(s.model, **FAST[options.fast])) for s in nets]
    console = Console(width=140)
    for row in (ROWS[name] for name in options.rows.split(",")):
        for s in (s for s in nets if options.wide or row.wanted(s)):
            part = replace(s, x=s.x[: row.images], y=s.y[: row.images])
            for peer in row.peers:
                if peer not in PEERS:
                    table.add_row(row.name, s.name, peer, "not installed", "", "", "", "", "")
                    continue
                line = compare(row, part, peer, options.repeat, options.device)
                console.print("  ".join(line))
                table.add_row(*line)
    console.print(table)


if __name__ == "__main__":
    main()
