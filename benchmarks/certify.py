"""What certificates cost: time in units of a forward pass, peak memory, and what each method proves.

    RBL_DATA=... OMP_NUM_THREADS=1 python benchmarks/certify.py [--rows speed,scaling,memory,mnist]
    RBL_DATA=... python benchmarks/certify.py --rows mnist --images 1000 [--nets ibp] [--eps 0.1,0.3]
    RBL_DATA=... python benchmarks/certify.py --device cuda --rows speed,scaling,memory,wide

- speed: the linear methods on conv16-conv32-fc100 at linf 0.1, through `bounds` with the nine margins, as certifiers;
- scaling: time and peak memory of every certifier against batch size, depth and width, each cell in a fresh process;
- memory: CROWN on that net, and on a seven-layer CIFAR net with 32,768-neuron layers;
- mnist: what each method certifies about our zoo (`certify_zoo.py`);
- wide: interval bounds and smoothing on a WideResNet-28-10 with random weights (a GPU's work).

Times on a CPU are those of the process (other work on the machine does not count), on a GPU those of CUDA events:
medians of runs that take turns. The unit is one forward pass of one image in float32, measured anew beside each run.
Certifiers work in float64 whatever the net's precision. Nothing keeps gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from certify_nets import first_images, margins_matrix, perceptron, seeded, seven_layers, small_net, stack
from certify_zoo import mnist
from meter import added_memory, in_fresh_process, pass_seconds, rounds, seconds
from nets import wide_resnet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from robustbench_lite.certify import CROWN, CROWNIBP, IBP, AlphaCROWN, Cascade, Exact, RandomizedSmoothing, bounds
from robustbench_lite.certify.base import Certifier
from robustbench_lite.certify.graph import graph_of
from robustbench_lite.core.results import Status
from robustbench_lite.core.threats import Lp

METHODS: dict[str, Certifier] = {
    "ibp": IBP(),
    "crown_ibp": CROWNIBP(),
    "crown": CROWN(),
    "alpha_crown": AlphaCROWN(steps=20),
    "cascade": Cascade(),  # without a falsifier: the longest way
    "exact": Exact(time_limit=60),
    "smoothing": RandomizedSmoothing(sigma=0.25, n0=100, n=1000),
}
LINEAR = ("ibp", "crown_ibp", "crown", "alpha_crown")
TARGETS = {  # units an image, at batch 1 and 20
    "ibp": ("3", "0.5"),
    "crown_ibp": ("12", "6.5"),
    "crown": ("60", "60"),
    "alpha_crown": ("500", ""),
}
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Cell:
    """One measurement of `scaling`: a method on freshly initialised weights."""

    method: str
    net: Callable[[int, int], nn.Module]
    depth: int
    width: int
    batch: int
    eps: float
    device: str


def speed(options: argparse.Namespace, console: Console) -> None:
    """Time the linear methods on the small net."""
    name, net = small_net()
    net = net.to(options.device)
    table = Table("method", "batch", "call", "ms an image", "units an image", "target", title=f"{name}, linf 0.1")
    for column, batch in enumerate((1, 20)):
        x, y = first_images("mnist", net, batch, options.device)
        works = dict(_calls(net, x, y, Lp("linf", 0.1)))
        found = rounds(works, partial(pass_seconds, net, x), options.repeat, options.device)
        for method in LINEAR:
            for call in ("bounds float32", "bounds float64", "certifier"):
                spent, units = (value / batch for value in found[f"{method} {call}"])
                target = TARGETS[method][column]
                table.add_row(method, str(batch), call, f"{1000 * spent:.3f}", f"{units:.2f}", target)
    console.print(table)


def _calls(net: nn.Module, x: Tensor, y: Tensor, threat: Lp) -> Iterator[tuple[str, Callable[[], object]]]:
    C = margins_matrix(y, 10)
    for method in LINEAR:
        for dtype in (torch.float32, torch.float64):
            images, rows = x.to(dtype), C.to(dtype)
            call = torch.no_grad()(partial(bounds, net, threat, method, rows, x=images))
            yield f"{method} bounds float{8 * dtype.itemsize}", call
        yield f"{method} certifier", partial(METHODS[method], net, x, y, threat)


def scaling(options: argparse.Namespace, console: Console) -> None:
    """Measure every certifier against batch size, depth and width, from one point in the middle."""
    title = "fresh weights: convolutions at linf 0.02 (exact: perceptrons at linf 0.01; smoothing: l2 0.1, 1,100 draws)"
    table = Table("method", "depth", "width", "batch", "ms an image", "units", "MB", "MB an image", title=title)
    table.add_column("verified / falsified / open")
    for cell in _cells(options.device):
        spent, units, added, counts = in_fresh_process(measured, cell)
        line = [cell.method, *(str(n) for n in (cell.depth, cell.width, cell.batch))]
        line += [f"{1000 * spent:.2f}", f"{units:.1f}", f"{added:.1f}", f"{added / cell.batch:.2f}", counts]
        console.print("  ".join(line), soft_wrap=True)
        table.add_row(*line)
    console.print(table)


def _cells(device: str) -> Iterator[Cell]:
    for method in METHODS:
        small = method == "exact"
        net, eps = (perceptron, 0.01) if small else (stack, 0.02)
        sizes = ((3, 2, 4), (12, 6, 24), (4, 1, 16)) if small else ((4, 6, 8), (16, 8, 32), (8, 1, 64))
        for depth, width, batch in _cross(*sizes):
            yield Cell(method, net, depth, width, batch, eps, "cpu" if small else device)


def _cross(*choices: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the first of all choices, and then each other choice beside the first of the rest."""
    middle = tuple(several[0] for several in choices)
    yield middle
    for place, several in enumerate(choices):
        for other in several[1:]:
            yield (*middle[:place], other, *middle[place + 1 :])


def measured(cell: Cell) -> tuple[float, float, float, str]:
    """Return seconds and units an image, added MB, and how many samples were verified, falsified and left open."""
    torch.set_num_threads(1)
    net = seeded(cell.net, cell.depth, cell.width).to(cell.device)
    x, y = first_images("mnist", net, cell.batch, cell.device)
    graph_of(net, x[:1])
    threat = Lp("l2", 0.1) if cell.method == "smoothing" else Lp("linf", cell.eps)
    work = partial(METHODS[cell.method], net, x, y, threat)
    added = added_memory(work, cell.device)
    repeat = 5 if seconds(work, cell.device) < 2 else 1
    spent, units = rounds({"": work}, partial(pass_seconds, net, x), repeat, cell.device)[""]
    status = work().status
    counts = [int((status == kind).sum()) for kind in (Status.VERIFIED, Status.FALSIFIED)]
    shown = " / ".join(str(count) for count in (*counts, len(x) - sum(counts)))
    return spent / cell.batch, units / cell.batch, added / MEGABYTE, shown


def memory(options: argparse.Namespace, console: Console) -> None:
    """Measure the peak of CROWN on the small net, and on the net with 32,768-neuron layers."""
    table = Table("net", "method", "call", "batch", "eps", "MB added", "s", "units an image", "verified", "target")
    works = [
        ("small", "crown", "bounds float32", 20, 0.1, "150"),
        ("small", "crown", "certifier", 20, 0.1, "150"),
        ("seven", "crown_ibp", "certifier", 32, options.seven_eps, "4,295"),
        ("seven", "crown", "certifier", options.seven_batch, options.seven_eps, "4,295"),
    ]
    for net, method, call, batch, eps, target in works:
        added, spent, units, verified = in_fresh_process(peak, net, method, call, batch, eps, options.device)
        line = [net, method, call, str(batch), f"{eps:.4f}", f"{added:.0f}", f"{spent:.1f}", f"{units:.0f}", verified]
        console.print("  ".join(line), soft_wrap=True)
        table.add_row(*line, target)
    console.print(table)


def peak(net: str, method: str, call: str, batch: int, eps: float, device: str) -> tuple[float, float, float, str]:
    """Return added MB, seconds in all, units an image, and how many were verified, of one call of one method."""
    torch.set_num_threads(1)
    model = (small_net()[1] if net == "small" else seeded(seven_layers)).to(device)
    x, y = first_images("mnist" if net == "small" else "cifar10", model, batch, device)
    graph_of(model, x[:1])
    unit, threat, C = pass_seconds(model, x), Lp("linf", eps), margins_matrix(y, 10)
    found: list[Tensor] = []
    taken: list[float] = []

    @torch.no_grad()
    def work() -> None:
        if call == "certifier":
            found.append(METHODS[method](model, x, y, threat).certified)
        else:
            found.append((bounds(model, threat, method, C, x=x)[0] > 0).all(dim=1))

    added = added_memory(lambda: taken.append(seconds(work, device)), device)
    return added / MEGABYTE, taken[0], taken[0] / unit / batch, f"{int(found[0].sum())}/{batch}"


def wide(options: argparse.Namespace, console: Console) -> None:
    """Time interval bounds and smoothing on a WideResNet-28-10."""
    subject = wide_resnet(options.images, options.device)
    threats = {"ibp": Lp("linf", 1 / 255), "smoothing": Lp("l2", 0.1)}
    works = {
        name: partial(METHODS[name], subject.model, subject.x, subject.y, threat) for name, threat in threats.items()
    }
    unit = partial(pass_seconds, subject.model, subject.x)
    table = Table("method", "images", "ms an image", "units an image", title=subject.name)
    for name, (spent, units) in rounds(works, unit, options.repeat, options.device).items():
        count = len(subject.x)
        table.add_row(name, str(count), f"{1000 * spent / count:.2f}", f"{units / count:.1f}")
    console.print(table)


ROWS = {"speed": speed, "scaling": scaling, "memory": memory, "mnist": mnist, "wide": wide}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="speed,scaling,memory,mnist", help="of: " + ", ".join(ROWS))
    parser.add_argument("--images", type=int, default=100, help="of mnist (all: 10000) and wide")
    parser.add_argument("--timed", type=int, default=500, help="mnist: images over which times are taken")
    parser.add_argument("--nets", default="", help="mnist: only nets whose name contains this")
    parser.add_argument("--eps", default="0.1,0.3", help="mnist: budgets")
    parser.add_argument("--repeat", type=int, default=15, help="runs of a cell of speed and wide")
    parser.add_argument("--seven-batch", type=int, default=32, help="images for CROWN on the seven-layer net")
    parser.add_argument("--seven-eps", type=float, default=1 / 255)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    console = Console(width=140)
    for name in options.rows.split(","):
        ROWS[name](options, console)


if __name__ == "__main__":
    main()
