"""The adversarial examples that are kept beside the records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from robustbench_lite.evaluation.cells import BLOCK, BLOCKS_PER_FILE

__all__ = ["Examples", "by_group", "read_examples", "write_examples"]


@dataclass(frozen=True)
class Examples:
    """Adversarial examples of some samples: dataset indices (n,), images (n, C, H, W), parameters (n, ...) if any."""

    index: np.ndarray[Any, Any]
    x_adv: np.ndarray[Any, Any]
    parameters: np.ndarray[Any, Any] | None = None

    @classmethod
    def join(cls, parts: list[Examples]) -> Examples | None:
        """Return the examples of several batches as one; None where there are none."""
        parts = [part for part in parts if len(part.index)]
        if not parts:
            return None
        arrays = [part.tensors() for part in parts]
        return cls(**{name: np.concatenate([array[name] for array in arrays]) for name in arrays[0]})

    def take(self, rows: np.ndarray[Any, Any]) -> Examples:
        """Return the examples at these positions."""
        return Examples(**{name: array[rows] for name, array in self.tensors().items()})

    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the arrays by the names they are stored under."""
        arrays = {"index": self.index, "x_adv": self.x_adv}
        arrays |= {} if self.parameters is None else {"parameters": self.parameters}
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def by_group(rows: pa.Table, examples: Examples | None) -> Iterator[tuple[pa.Table, Examples | None]]:
    """Yield the rows and the examples that go into one file: those of each group of blocks."""
    groups = _group_of(rows.column("index").to_numpy())
    numbers = np.unique(groups).tolist()
    if len(numbers) == 1:
        yield rows, examples
        return
    for group in numbers:
        own = None if examples is None else examples.take(np.flatnonzero(_group_of(examples.index) == group))
        yield rows.filter(pa.array(groups == group)), own


def _group_of(indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return indices // (BLOCK * BLOCKS_PER_FILE)


def read_examples(path: Path) -> Examples:
    """Read a file of examples.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    try:
        tensors = load_file(path)
        return Examples(tensors["index"], tensors["x_adv"], tensors.get("parameters"))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"damaged examples {path.name}: {error}") from error


def write_examples(examples: Examples, stream: BinaryIO) -> None:
    """Write a file of examples."""
    stream.write(save(examples.tensors()))
