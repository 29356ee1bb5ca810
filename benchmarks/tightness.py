"""How far each method stays from the exact minimum, on tiny ReLU nets: `python benchmarks/tightness.py [nets]`.

Prints, for each norm, the mean over nets, images and margins of (exact minimum - lower bound), and the share of the
gap between CROWN and the linear relaxation over the same boxes that the ascent of alpha-CROWN closes. Exits with an
error where a bound exceeds the next tighter one. No bound of single neurons can pass the relaxation; what is left
between it and the exact value takes branching.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor, nn

from robustbench_lite.certify import bounds, exact_margins, graph_of, relaxation_bounds
from robustbench_lite.certify.inputs import input_region
from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.linear_bounds import LinearBounds, specification_rows
from robustbench_lite.certify.slopes import Ascent
from robustbench_lite.core.threats import Lp

EPS = {"linf": 0.2, "l1": 1.0, "l0": 2.0}
ORDER = ("ibp", "crown", "alpha_crown", "relaxation", "exact")
C = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)


class Residual(nn.Module):
    """Two convolutions, a strided shortcut, and a join."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.skip = nn.Conv2d(1, 2, 2), nn.Conv2d(1, 2, 1, 2)
        self.down, self.head = nn.Conv2d(2, 2, 2, 2, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 3) of images (B, 1, 3, 3)."""
        h = self.down(torch.relu(self.conv(x))) + self.skip(x)
        return self.head(torch.relu(h).flatten(1))


def net_for(seed: int) -> nn.Module:
    """Return a random net: one to three hidden layers, or a residual one, in turn."""
    torch.manual_seed(seed)
    if seed % 4 == 3:
        return Residual().double()
    widths = [9, *[7] * (seed % 4 + 1), 3]
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1]).double()


def lower_bounds(net: nn.Module, x: Tensor, threat: Lp) -> dict[str, Tensor]:
    """Return lower bounds (B, S) of C z by method, from loose to tight, and the exact minima."""
    methods = ("crown_ibp", "crown") if threat.norm == "l0" else ("ibp", "crown_ibp", "crown")
    found = {method: bounds(net, threat, method, C, x=x)[0].detach() for method in methods}
    region = input_region(threat, x, tuple(EPS))
    with torch.no_grad():
        own = LinearBounds(graph_of(net, x), net, region, C)
    ascended = Ascent().best(own, specification_rows(C, len(x))).reshape(len(x), -1)
    found["alpha_crown"] = torch.maximum(found["crown"], ascended)
    boxes = {
        i: box for i, box in enumerate(own.values) if isinstance(box, Interval) and bool(box.lower.isfinite().all())
    }
    found["relaxation"] = relaxation_bounds(net, x, threat, C, boxes)
    found["exact"] = exact_margins(net, x, threat, C)[0]
    return found


def main(count: int) -> int:
    """Print a table for each norm; return the number of bounds that are out of order."""
    wrong = 0
    for norm, eps in EPS.items():
        gaps: dict[str, list[Tensor]] = {}
        for seed in range(count):
            x = torch.rand(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            found = lower_bounds(net_for(seed), x, Lp(norm, eps))
            chain = [found[method] for method in ORDER if method in found]
            wrong += sum(int((loose > tight + 1e-6).sum()) for loose, tight in itertools.pairwise(chain))
            for method, lower in found.items():
                gaps.setdefault(method, []).append((found["exact"] - lower).flatten())
        mean = {method: float(torch.cat(values).mean()) for method, values in gaps.items()}
        print(f"{norm} eps {eps:g}, {count} nets: mean gap to the exact minimum")
        for method, gap in mean.items():
            print(f"  {method:12} {gap:9.5f}")
        closed = (mean["crown"] - mean["alpha_crown"]) / (mean["crown"] - mean["relaxation"])
        print(f"  alpha-CROWN closes {100 * closed:.0f} % of what separates CROWN from the relaxation")
    print(f"bounds out of order: {wrong}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 24) > 0)
