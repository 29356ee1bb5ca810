"""QuickAutoAttack against AutoAttack, ours and a peer's: robust accuracy and time, in one process, in turn.

Prints one row a net and threat: robust accuracy of each, and how many times faster than the peer ours are (process
time). Nets and images come from the folder RBL_DATA names and from the zoo; what is not there is left out and named.
The peer is pyautoattack; where it is not installed, our AutoAttack is what Quick is compared with.

    RBL_DATA=... python benchmarks/quick_auto_attack.py --images 256 --only mnist
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from nets import resnet2b
from torch import Tensor, nn

from robustbench_lite.attacks import Attack, AutoAttack, QuickAutoAttack
from robustbench_lite.core.models import frozen
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.models import Normalize
from robustbench_lite.zoo import load_defense

Case = tuple[str, nn.Module, str, Lp]
PEER_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def small(channels: int, features: int) -> nn.Sequential:
    """The "small" net of the certification literature."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def third_party(folder: Path) -> Iterator[Case]:
    """Nets that others trained, from the folder of shared data."""
    for file, norm, eps in [
        ("mnist_small_adv.pth", "linf", 0.3),
        ("mnist_small_adv.pth", "l2", 1.5),
        ("mnist_small_wong_kolter.pth", "linf", 0.1),
        ("cifar_small_adv.pth", "linf", 2 / 255),
        ("cifar_small_adv.pth", "l2", 0.25),
        ("cifar_resnet2b.pth", "linf", 2 / 255),
    ]:
        if not (folder / file).exists():
            print(f"left out: {file}, which is not in RBL_DATA/nets")
            continue
        yield (
            file.removesuffix(".pth"),
            published(folder / file),
            "cifar10" if "cifar" in file else "mnist",
            Lp(norm, eps),
        )


def published(path: Path) -> nn.Module:
    """One of these nets, behind the normalisation that it was trained with."""
    if path.name == "cifar_resnet2b.pth":
        return resnet2b()
    net = small(3, 2048) if path.name == "cifar_small_adv.pth" else small(1, 1568)
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    if path.name != "cifar_small_adv.pth":
        return net
    return nn.Sequential(Normalize([125.3 / 255, 123 / 255, 113.9 / 255], [63 / 255, 62.1 / 255, 66.7 / 255]), net)


def cases(folder: Path) -> Iterator[Case]:
    """Every net with its data and threat."""
    for name, norm, eps in [
        ("digits/pgd_at", "linf", 0.1),
        ("mnist/standard", "linf", 0.1),
        ("mnist/standard", "l2", 1.0),
        ("mnist/pgd_at_0.3", "linf", 0.3),
        ("mnist/pgd_at_0.3", "l2", 2.0),
        ("mnist/pgd_at_0.3", "l1", 10.0),
        ("mnist/pgd_at_l2_2", "l2", 2.0),
        ("mnist/trades_0.3", "l2", 1.5),
        ("mnist/ibp_0.3", "linf", 0.3),
        ("mnist/ibp_0.3", "l2", 1.0),
        ("mnist/mtl_ibp_0.3", "l2", 1.0),
    ]:
        yield name, load_defense(name), name.split("/")[0], Lp(norm, eps)
    yield from third_party(folder / "nets")


def images_of(data: str, folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` test images, float32 in [0, 1], and labels."""
    if data == "digits":
        digits = load_data("digits")
        return digits.images[:count], digits.labels[:count]
    file = np.load(folder / ("mnist.npz" if data == "mnist" else "cifar10_test.npz"))
    x = torch.from_numpy(file["x_test"][:count]).float() / 255
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
    return x, torch.from_numpy(file["y_test"][:count].astype(np.int64)).flatten()


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What `run` returns, and the process time it took in seconds."""
    start = time.process_time()
    return run(), time.process_time() - start


def attackers(net: nn.Module, x: Tensor, y: Tensor, threat: Lp, with_auto: bool) -> dict[str, Callable[[], Tensor]]:
    """What is compared: each returns bool (B,), who stands."""

    def stand(attack: Attack) -> Tensor:
        return ~attack(net, x, y, threat).success

    runs: dict[str, Callable[[], Tensor]] = {"quick": lambda: stand(QuickAutoAttack())}
    if with_auto:
        runs["auto"] = lambda: stand(AutoAttack())
    if importlib.util.find_spec("pyautoattack"):
        from pyautoattack import AutoAttack as Peer

        def peer() -> Tensor:
            judge = Peer(net, norm=PEER_NORMS[threat.norm], eps=float(threat.radius(x).max()), seed=0)
            found = judge.run_standard_evaluation(x, y, batch_size=len(x))[0]
            with torch.no_grad():
                return net(found).argmax(dim=1) == y

        runs["peer"] = peer
    return runs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of nets")
    parser.add_argument("--norms", nargs="*", default=list(PEER_NORMS), choices=list(PEER_NORMS))
    parser.add_argument("--skip-auto", action="store_true", help="leave our own AutoAttack out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ.get("RBL_DATA", "data_cache"))
    print(
        f"{options.images} images; robust accuracy in % (process time in s); times: how many times faster than the last"
    )
    for name, net, data, threat in cases(folder):
        if threat.norm not in options.norms or (options.only and not any(part in name for part in options.only)):
            continue
        x, y = images_of(data, folder, options.images)
        with frozen(net):
            results = {who: timed(run) for who, run in attackers(net, x, y, threat, not options.skip_auto).items()}
        slowest = list(results.values())[-1][1]
        cells = [
            f"{who} {100 * float(stand.double().mean()):.2f} ({seconds:.1f} s, {slowest / seconds:.1f} times)"
            for who, (stand, seconds) in results.items()
        ]
        print(f"{name} {threat.norm} {float(threat.radius(x).max()):.4g}: " + "; ".join(cells), flush=True)


if __name__ == "__main__":
    main()
