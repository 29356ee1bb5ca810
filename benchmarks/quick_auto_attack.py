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
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_lite.attacks import Attack, AutoAttack, QuickAutoAttack
from robustbench_lite.core.models import frozen
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.zoo import load_defense

Case = tuple[str, nn.Module, str, Lp]
PEER_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class Normalised(nn.Module):
    """A net behind the normalisation that it was trained with."""

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] to logits."""
        logits: Tensor = self.net((x - self.mean) / self.std)
        return logits


class Block(nn.Module):
    """A residual block without batch normalisation."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions around a shortcut."""
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResNet2b(nn.Module):
    """The small residual net of the verification competitions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        self.linear1, self.linear2 = nn.Linear(1024, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, 32, 32) to logits (B, 10)."""
        features = self.layer1(F.relu(self.conv1(x))).flatten(1)
        logits: Tensor = self.linear2(F.relu(self.linear1(features)))
        return logits


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


def weights(path: Path) -> dict[str, Tensor]:
    """Weights of a net that others trained."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    return dict(state.get("state_dict", state))


def third_party(nets: Path) -> Iterator[Case]:
    """Nets that others trained, from the folder of shared data."""
    for file, net, norm, eps in [
        ("mnist_small_adv.pth", small(1, 1568), "linf", 0.3),
        ("mnist_small_wong_kolter.pth", small(1, 1568), "linf", 0.1),
        ("cifar_small_adv.pth", small(3, 2048), "linf", 2 / 255),
        ("cifar_small_adv.pth", small(3, 2048), "l2", 0.25),
        ("cifar_resnet2b.pth", ResNet2b(), "linf", 2 / 255),
    ]:
        if not (nets / file).exists():
            print(f"left out: {file}, which is not in RBL_DATA/nets")
            continue
        net.load_state_dict(weights(nets / file))
        if file == "cifar_small_adv.pth":
            net = Normalised(net, [125.3 / 255, 123 / 255, 113.9 / 255], [63 / 255, 62.1 / 255, 66.7 / 255])
        if file == "cifar_resnet2b.pth":
            net = Normalised(net, [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616])
        yield file.removesuffix(".pth"), net, "cifar10" if "cifar" in file else "mnist", Lp(norm, eps)


def cases(folder: Path) -> Iterator[Case]:
    """Every net with its data and threat."""
    for name, norm, eps in [
        ("digits/pgd_at", "linf", 0.1),
        ("mnist/standard", "linf", 0.1),
        ("mnist/standard", "l2", 1.0),
        ("mnist/pgd_at_0.3", "linf", 0.3),
        ("mnist/pgd_at_0.3", "l2", 2.0),
        ("mnist/ibp_0.3", "linf", 0.3),
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
    parser.add_argument("--skip-auto", action="store_true", help="leave our own AutoAttack out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ.get("RBL_DATA", "data_cache"))
    print(
        f"{options.images} images; robust accuracy in % (process time in s); times: how many times faster than the last"
    )
    for name, net, data, threat in cases(folder):
        if options.only and not any(part in name for part in options.only):
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
