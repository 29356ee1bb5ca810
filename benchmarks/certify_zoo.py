"""What each certifier proves about the MNIST zoo, in what time, and whether the cascade loses anything."""

from __future__ import annotations

import argparse
from functools import partial

import torch
from meter import seconds
from nets import DATA
from rich.console import Console
from rich.table import Table
from torch import Tensor

from robustbench_lite.attacks import PGD
from robustbench_lite.certify import CROWN, CROWNIBP, IBP, AlphaCROWN, Cascade
from robustbench_lite.certify.base import Certifier
from robustbench_lite.certify.graph import graph_of
from robustbench_lite.core.results import Certificate, Status
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.zoo import load_defense

NETS = ("mnist/ibp_0.1", "mnist/ibp_0.3", "mnist/pgd_at_0.3", "mnist/standard")
STAGES: dict[str, Certifier] = {"IBP": IBP(), "CROWN-IBP": CROWNIBP(), "CROWN": CROWN(), "alpha-CROWN": AlphaCROWN()}
METHODS = {**STAGES, "cascade": Cascade(falsifier=PGD(steps=10, loss="margin"))}
PART = 100  # images that the methods take in turn


def mnist(options: argparse.Namespace, console: Console) -> None:
    """Print certified accuracy and time an image of each method, net and eps."""
    x, y = (t[: options.images] for t in _test_set())
    table = Table("net", "eps", "clean %", title=f"MNIST, the first {len(x)} test images: certified %, ms an image")
    for column in (*METHODS, "falsified %", "CROWN / cascade", "alpha-CROWN / cascade", "contains its stages"):
        table.add_column(column)
    for net in (name for name in NETS if options.nets in name):
        for eps in (float(eps) for eps in options.eps.split(",")):
            line = [net, f"{eps:g}", *_line(net, eps, x, y, options.device)]
            console.print("  ".join(line).replace("\n", " "), soft_wrap=True)
            table.add_row(*line)
    console.print(table)


def _test_set() -> tuple[Tensor, Tensor]:
    data = load_data("mnist", data_dir=DATA)
    return data.images, data.labels


def _line(net: str, eps: float, x: Tensor, y: Tensor, device: str) -> list[str]:
    model, x, y = load_defense(net).to(device), x.to(device), y.to(device)
    found: dict[str, list[Certificate]] = {name: [] for name in METHODS}
    spent = dict.fromkeys(METHODS, 0.0)
    graph_of(model, x[:1])
    for images, labels in zip(x.split(PART), y.split(PART), strict=True):
        for name, method in METHODS.items():
            work = partial(method, model, images, labels, Lp("linf", eps))
            spent[name] += seconds(lambda work=work, name=name: found[name].append(work()), device)
    sets = {name: torch.cat([part.certified for part in parts]) for name, parts in found.items()}
    union = torch.stack([sets[name] for name in STAGES]).any(dim=0)
    missed, extra = int((union & ~sets["cascade"]).sum()), int((sets["cascade"] & ~union).sum())
    clean = torch.cat([part.prediction for part in found["cascade"]]) == y
    fallen = torch.cat([part.status for part in found["cascade"]]) == int(Status.FALSIFIED)
    return [
        f"{100 * clean.double().mean():.2f}",
        *(f"{100 * sets[name].double().mean():.2f}\n{1000 * spent[name] / len(x):.1f} ms" for name in METHODS),
        f"{100 * fallen.double().mean():.2f}",
        *(f"{spent[name] / spent['cascade']:.2f}" for name in ("CROWN", "alpha-CROWN")),
        (f"yes, and {extra} more" if extra else "yes") if missed == 0 else f"NO: misses {missed}",
    ]
