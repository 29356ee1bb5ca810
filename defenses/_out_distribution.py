"""Images that belong to no class, made of a batch: noise, shuffled images, mixtures of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustbench_lite.core.errors import lookup

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams
    from robustbench_lite.defenses.base import Batch, TrainingData

__all__ = ["KINDS", "check_kinds", "check_others", "out_of_distribution"]

GRIDS = (4, 3, 2, 5, 7)  # blocks a side, the first that divides both sides


def uniform(batch: Batch, streams: Streams) -> Tensor:
    """Return pixels uniform in [0, 1]."""
    return streams.uniform(*batch.x.shape[1:], dtype=batch.x.dtype)


def gaussian(batch: Batch, streams: Streams) -> Tensor:
    """Return Gaussian pixels around 0.5 with standard deviation 0.25, cut to [0, 1]."""
    return (0.5 + 0.25 * streams.normal(*batch.x.shape[1:], dtype=batch.x.dtype)).clamp(0, 1)


def pixels(batch: Batch, streams: Streams) -> Tensor:
    """Return each image with its pixels in random order, the same in all channels."""
    rows = batch.x.flatten(2)
    order = streams.uniform(rows.shape[2]).argsort(dim=1).unsqueeze(1).expand_as(rows)
    return rows.gather(2, order).reshape(batch.x.shape)


def blocks(batch: Batch, streams: Streams) -> Tensor:
    """Return each image cut into a grid of equal blocks, in random order; 4 x 4 where the sides allow it.

    Raises:
        ValueError: sides that no grid of 2 to 5, or 7, blocks divides.
    """
    count, channels, height, width = batch.x.shape
    grid = next((g for g in GRIDS if height % g == 0 and width % g == 0), None)
    if grid is None:
        raise ValueError(f"images of {height} x {width} cannot be cut into equal blocks: use other kinds than 'blocks'")
    tall, wide = height // grid, width // grid
    cut = batch.x.reshape(count, channels, grid, tall, grid, wide).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = streams.uniform(grid * grid).argsort(dim=1).reshape(count, -1, 1, 1, 1).expand_as(cut)
    mixed = cut.gather(1, order).reshape(count, grid, grid, channels, tall, wide)
    return mixed.permute(0, 3, 1, 4, 2, 5).reshape(batch.x.shape)


def mixes(batch: Batch, streams: Streams) -> Tensor:
    """Return convex mixes w x + (1 - w) x' of images of different classes, w uniform in [0.4, 0.6].

    The partner is drawn from the other classes of the batch; where it has none, from uniform noise.
    """
    others = batch.y.unsqueeze(1) != batch.y.unsqueeze(0)
    draw = streams.uniform(len(batch.x)).masked_fill(~others, -1)
    lonely = ~others.any(dim=1).reshape(-1, 1, 1, 1)
    partner = torch.where(lonely, uniform(batch, streams), batch.x[draw.argmax(dim=1)])
    weight = 0.4 + 0.2 * streams.uniform(1, 1, 1, dtype=batch.x.dtype)
    return weight * batch.x + (1 - weight) * partner


KINDS: dict[str, Callable[[Batch, Streams], Tensor]] = {
    "uniform": uniform,
    "gaussian": gaussian,
    "pixels": pixels,
    "blocks": blocks,
    "mixes": mixes,
}


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple.

    Raises:
        ValueError: an unknown name, or one twice.
    """
    if isinstance(kinds, str):
        raise ValueError(f"kinds are a list of names, got the text {kinds!r}: write [{kinds}]")
    for kind in kinds:
        lookup(kind, KINDS, "kind of out-distribution image")
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"each kind of out-distribution image may come once, got {list(kinds)}")
    return tuple(kinds)


def check_others(others: TrainingData | None, data: TrainingData) -> None:
    """Check that the images of another data set fit those to be trained on.

    Raises:
        ValueError: another shape.
    """
    if others is not None and others.images.shape[1:] != data.images.shape[1:]:
        raise ValueError(
            f"out-distribution images must have the shape {tuple(data.images.shape[1:])} of the data, got "
            f"{tuple(others.images.shape[1:])}"
        )


def out_of_distribution(
    batch: Batch, kinds: Sequence[str], streams: Streams, others: TrainingData | None = None
) -> Tensor:
    """Return one image (B, C, H, W) in the place of each of the batch, its source drawn evenly.

    Args:
        batch: what the images are made of.
        kinds: names of `KINDS`.
        streams: the random streams of the samples.
        others: another data set, which counts as one more kind.
    """
    made = [KINDS[kind](batch, streams.fork(number)) for number, kind in enumerate(kinds)]
    if others is not None:
        chosen = streams.fork(len(KINDS)).integers(len(others.images)).to(others.images.device)
        made.append(others.images[chosen].to(batch.x))
    source = streams.integers(len(made))
    return torch.stack(made)[source, torch.arange(len(source), device=source.device)]
