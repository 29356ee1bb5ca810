"""Questions in chunks that fit in memory: what a model takes per image is watched during its first forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Memory"]

Ask = Callable[[slice], tuple[Tensor, ...]]

FIRST_PASS = 64  # images in the pass that is watched: before it nothing is known
CPU_BUDGET = 2**30
PER_PROBE = 20  # image-sized tensors that an attack holds for each probe


class Memory:
    """Splits questions about many images into forward passes that keep within a budget.

    Args:
        budget: bytes for the images of a question and the model's activations; None: 1 GiB (an eighth of a GPU's
            memory) where no gradient is asked for, no limit where one is.
        x: the images (B, C, H, W) that the questions are about.
        watch: False for a model that cannot be watched (a compiled one): then its largest activation is taken to be
            64 times its input.
        passes: forward passes of the model in one graph for gradients.

    Attributes:
        capacity: probe images that may be alive at a time.
        budget: the bytes in force.
    """

    def __init__(self, budget: int | None, x: Tensor, watch: bool = True, passes: int = 1) -> None:
        if budget is not None and budget < 1:
            raise ValueError(f"a memory budget is a number of bytes, at least 1, got {budget}")
        self.budget = _default_budget(x.device) if budget is None else budget
        self._image = x[0].numel() * x.element_size() if len(x) else 1
        self._limited, self._passes = budget is not None, passes
        self._most: int | None = None  # images in one pass, once a GPU has run out of memory
        self.capacity, self._graphs = FIRST_PASS, FIRST_PASS
        self._watch = watch
        if not watch:
            self._learn(64 * self._image, 1024 * self._image)

    @property
    def graphs(self) -> int:
        """Points whose graphs for gradients may be alive at a time; 2^62 where nothing limits them."""
        return min(self._size(graph=True), self._most or 2**62)

    def ask(self, ask: Ask, count: int, *, graph: bool = False) -> tuple[Tensor, ...]:
        """Ask about positions 0 .. count - 1 in chunks, and join the answers; `graph`: a graph for gradients is kept.

        A chunk that does not fit in the memory of a GPU is halved until it does.
        """
        while True:
            try:
                answers = self._run(ask, count, graph)
                break
            except torch.OutOfMemoryError:
                size = min(count, self._most or count, self._size(graph))
                if size <= 1:
                    raise
                self._most = (size + 1) // 2
                self.capacity = min(self.capacity, self._most)
                torch.cuda.empty_cache()
        return answers[0] if len(answers) == 1 else tuple(torch.cat(part) for part in zip(*answers, strict=True))

    def _run(self, ask: Ask, count: int, graph: bool) -> list[tuple[Tensor, ...]]:
        answers: list[tuple[Tensor, ...]] = []
        start = 0
        while start < count or not answers:
            if self._watch and not graph:
                part = slice(0, min(count, FIRST_PASS, self._most or count))
                answers.append(self._watched(ask, part))
            else:
                part = slice(start, min(count, start + max(1, min(self._size(graph), self._most or count))))
                answers.append(ask(part))
            start = part.stop
        return answers

    def _size(self, graph: bool) -> int:
        if graph and not self._limited:
            return 2**62
        return self._graphs if graph else self.capacity

    def _watched(self, ask: Ask, part: slice) -> tuple[Tensor, ...]:
        with _Watch() as seen:
            answer = ask(part)
        if part.stop:
            self._learn(seen.largest / part.stop, seen.total / part.stop)
            self._watch = False
        return answer

    def _learn(self, largest: float, total: float) -> None:
        """Set the chunk sizes from the bytes of one image's largest activation, and of all of them together.

        Without a graph about four tensors of the largest size are alive (an operator's input, output and workspace,
        and a shortcut), and an attack holds about twenty images for each probe: draws, directions, probes, and what
        operators make of them, some in float64. A graph keeps all activations, and the backward pass a few more.
        """
        self.capacity = max(1, int(self.budget / (4 * largest + PER_PROBE * self._image)))
        graph = 1.5 * total * self._passes + 4 * largest + PER_PROBE * self._image
        self._graphs = max(1, int(self.budget / graph))


def _default_budget(device: torch.device) -> int:
    # Not what is free: chunks, and so the last bits of an answer, must not depend on what else runs.
    return int(torch.cuda.get_device_properties(device).total_memory // 8) if device.type == "cuda" else CPU_BUDGET


class _Watch(TorchDispatchMode):
    """Notes the bytes of the largest output of the operators that run inside, and of all outputs together."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = self.total = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator; a view takes no memory of its own."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and not getattr(func, "is_view", False):
                size = tensor.numel() * tensor.element_size()
                self.largest, self.total = max(self.largest, size), self.total + size
        return out
