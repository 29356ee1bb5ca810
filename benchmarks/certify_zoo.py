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
    """Print certified accuracy of each method, net and eps, and time an image over the first images.

    Beyond those that are timed, no method is asked about an image that the cascade's falsifier has felled: there is
    nothing to prove.
    """
    x, y = (t[: options.images] for t in _test_set())
    timed = min(options.timed, len(x))
    title = (
        f"MNIST, the first {len(x)} test images: certified %; ms an image and ratios of times over the first {timed}"
    )
    table = Table("net", "eps", "clean %", title=title)
    for column in (*METHODS, "falsified %", "CROWN / cascade", "alpha-CROWN / cascade", "contains its stages"):
        table.add_column(column)
    for net in (name for name in NETS if options.nets in name):
        for eps in (float(eps) for eps in options.eps.split(",")):
            line = [net, f"{eps:g}", *_line(net, eps, x, y, timed, options.device)]
            console.print("  ".join(line).replace("\n", " "), soft_wrap=True)
            table.add_row(*line)
    console.print(table)


def _test_set() -> tuple[Tensor, Tensor]:
    data = load_data("mnist", data_dir=DATA)
    return data.images, data.labels


def _line(net: str, eps: float, x: Tensor, y: Tensor, timed: int, device: str) -> list[str]:
    model, x, y, threat = load_defense(net).to(device), x.to(device), y.to(device), Lp("linf", eps)
    graph_of(model, x[:1])
    spent = dict.fromkeys(METHODS, 0.0)
    parts: list[dict[str, Certificate]] = []
    for start in range(0, timed, PART):
        images, labels = x[start : min(start + PART, timed)], y[start : min(start + PART, timed)]
        parts.append({})
        for name, method in METHODS.items():
            work = partial(method, model, images, labels, threat)
            spent[name] += seconds(lambda work=work, name=name: parts[-1].update({name: work()}), device)
    sets = {name: torch.cat([part[name].certified for part in parts]) for name in METHODS}
    rest = METHODS["cascade"](model, x[timed:], y[timed:], threat, indices=torch.arange(timed, len(x)))
    standing = timed + (rest.status != int(Status.FALSIFIED)).nonzero().flatten()
    for name, method in STAGES.items():
        proven = torch.zeros(len(x), dtype=torch.bool, device=device).index_put((torch.arange(timed),), sets[name])
        sets[name] = proven.index_put((standing,), method(model, x[standing], y[standing], threat).certified)
    sets["cascade"] = torch.cat([sets["cascade"], rest.certified])
    union = torch.stack([sets[name] for name in STAGES]).any(dim=0)
    missed, extra = int((union & ~sets["cascade"]).sum()), int((sets["cascade"] & ~union).sum())
    answers = [*(part["cascade"] for part in parts), rest]
    clean = torch.cat([part.prediction for part in answers]) == y
    fallen = torch.cat([part.status for part in answers]) == int(Status.FALSIFIED)
    return [
        f"{100 * clean.double().mean():.2f}",
        *(f"{100 * sets[name].double().mean():.2f}\n{1000 * spent[name] / timed:.1f} ms" for name in METHODS),
        f"{100 * fallen.double().mean():.2f}",
        *(f"{spent[name] / spent['cascade']:.2f}" for name in ("CROWN", "alpha-CROWN")),
        (f"yes, and {extra} more" if extra else "yes") if missed == 0 else f"NO: misses {missed}",
    ]
