"""The gradient of a net's first convolution with respect to images: PyTorch's own, and ours, in turn, on a CPU.

One line a convolution: milliseconds of the convolution, of PyTorch's gradient, and of ours, each the median of
`--repeat` rounds, the median ratio of neighbours, and the largest difference as a share of the largest value. CPU
seconds, one thread, float32.

    python benchmarks/first_layer.py
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from meter import seconds
from torch import Tensor, nn

from robustbench_lite.core.convolutions import image_gradients

SHAPES = (  # batch, channels, side, filters, kernel, stride, padding
    (240, 1, 28, 16, 4, 2, 1),
    (240, 1, 28, 32, 3, 1, 1),
    (240, 1, 28, 32, 5, 1, 2),
    (240, 3, 32, 8, 3, 2, 1),
    (64, 3, 32, 16, 3, 1, 1),
    (64, 3, 32, 64, 3, 1, 1),
    (32, 3, 32, 160, 3, 1, 1),
    (16, 3, 224, 64, 7, 2, 3),
    (64, 3, 32, 16, 5, 1, 2),
    (64, 2, 32, 16, 3, 1, 1),
)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("images            convolution          forward   theirs     ours   ratio   difference")
    for batch, channels, side, filters, kernel, stride, padding in SHAPES:
        net = nn.Conv2d(channels, filters, kernel, stride, padding).requires_grad_(False)
        x = torch.rand(batch, channels, side, side).requires_grad_()
        theirs = net(x)
        with image_gradients(x):
            ours = net(x)
        weights = torch.randn_like(theirs)
        works = [partial(net, x), partial(_slope, theirs, x, weights), partial(_slope, ours, x, weights)]
        taken = [[seconds(work, "cpu") for work in works] for _ in range(options.repeat + 2)][2:]
        forward, own, other = (1000 * statistics.median(column) for column in zip(*taken, strict=True))
        ratio = statistics.median(row[1] / row[2] for row in taken)
        first, second = works[1](), works[2]()
        error = float((first - second).abs().max() / first.abs().max())
        images, layer = f"{batch}x{channels}x{side}x{side}", f"{filters} of {kernel}x{kernel}, stride {stride}"
        print(f"{images:17s} {layer:20s} {forward:6.2f}   {own:6.2f}   {other:6.2f}   {ratio:5.2f}   {error:.0e}")


def _slope(answer: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    return torch.autograd.grad(answer, x, weights, retain_graph=True)[0]


if __name__ == "__main__":
    main()
