"""Asks a base classifier about corrupted copies of images and counts its answers on the device.

What a sample draws depends on its own stream alone: draws come in blocks whose size is fixed by the image's shape, each
vote of each sample has its own generator, and memory budget and batch only decide how many blocks share a forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustbench_lite.certify._corruptions import Corruption
from robustbench_lite.certify.errors import CannotCertify
from robustbench_lite.certify.forward import answer
from robustbench_lite.core.checks import check_logits, check_predictions, explain_mismatch
from robustbench_lite.core.memory import Memory
from robustbench_lite.core.models import Model, is_stochastic, predict
from robustbench_lite.core.rng import Streams

__all__: list[str] = []

BLOCK = 128  # draws: torch's generators give other values for other sizes, so a sample always draws whole blocks
BLOCK_VALUES = 2**18  # or as many draws as have this many values: 1 MB in float32
CPU_PASS = 256  # copies in a forward pass, or BLOCK_VALUES: their activations stay in a CPU's cache
PROBES = 4  # copies that are asked about twice
AGREEMENT = 5e-3  # of the size of the logits: the rounding of TF32 and of other batch sizes stays below


class Ballot:
    """One vote for each image of a chunk, open for more draws.

    Args:
        streams: a generator is made from each.
        num_classes: K.
    """

    def __init__(self, streams: Streams, num_classes: int) -> None:
        seeds = streams.integers(2**62).tolist()
        self.generators = [torch.Generator(streams.device).manual_seed(seed) for seed in seeds]
        self.tally = torch.zeros(len(seeds), num_classes + 2, dtype=torch.int64, device=streams.device)

    @property
    def counts(self) -> Tensor:
        """int64 (B, K): the votes so far, without abstentions and answers that are not finite."""
        return self.tally[:, :-2]


class Poll:
    """Asks a base classifier about corrupted copies of the images of a chunk.

    Args:
        model: the base classifier, frozen and in eval mode.
        x: images (B, C, H, W), B > 0.
        corruption: what is done to them.
        memory_budget: bytes, as in `core.memory.Memory`.

    Attributes:
        num_classes: K, of the model.
        sensitivity: of the corruption, as in `Votes`.
        block: draws that come together.

    Raises:
        TypeError: the model does not answer with logits, or its `predict` not with labels.
        ValueError: fewer than two classes, a model that is stochastic, keeps a state or mixes the images of a batch, or
            an answer of another shape.
    """

    def __init__(self, model: Model, x: Tensor, corruption: Corruption, memory_budget: int | None) -> None:
        self._model, self._x, self._corruption = model, x, corruption
        self.sensitivity = corruption.sensitivity
        shape = corruption.shape(x.shape[1:])
        self.block = max(1, min(BLOCK, BLOCK_VALUES // shape.numel()))
        self._memory = Memory(memory_budget, x.new_empty(1, *shape), watch=not hasattr(model, "_orig_mod"))
        probes = x.new_empty(PROBES, *shape)
        corruption.write_(probes, x[0], torch.Generator(x.device).manual_seed(0))
        owner = torch.zeros(PROBES, dtype=torch.int64, device=x.device)
        self.num_classes = _examine(model, corruption, probes, x, owner)
        check_predictions(self._labels(probes, owner), probes)  # and the memory learns what a pass takes
        most = self._memory.capacity
        if x.device.type != "cuda":
            most = min(most, max(CPU_PASS, BLOCK_VALUES // shape.numel()))
        self._fold = max(1, min(len(x), most // self.block))
        self._buffer = x.new_empty(self._fold, self.block, *shape)

    def extend(self, ballot: Ballot, rows: list[int], start: int, stop: int) -> None:
        """Draw the copies `start` .. `stop` - 1 of these rows; `start` is a multiple of `block`."""
        for first in range(0, len(rows), self._fold):
            group = rows[first : first + self._fold]
            owners = torch.tensor(group, device=self._x.device)
            for draw in range(start, stop, self.block):
                self._count(ballot, group, owners, min(self.block, stop - draw))

    def _count(self, ballot: Ballot, group: list[int], owners: Tensor, used: int) -> None:
        for slots, row in zip(self._buffer, group, strict=False):
            self._corruption.write_(slots, self._x[row], ballot.generators[row])
        owner = owners.repeat_interleave(used, output_size=len(group) * used)
        labels = self._labels(self._buffer[: len(group), :used].flatten(0, 1), owner)
        width = self.num_classes + 2  # the last two columns are for ABSTAIN and INVALID
        column = torch.where(labels < 0, self.num_classes - 1 - labels, labels).clamp(0, width - 1)
        ballot.tally.view(-1).scatter_add_(0, owner * width + column, torch.ones_like(column))

    def _predict(self, images: Tensor) -> Tensor:
        return predict(self._model, images)

    def _labels(self, slots: Tensor, owner: Tensor) -> Tensor:
        def ask(part: slice) -> tuple[Tensor]:
            return (self._corruption.ask(self._predict, slots[part], self._x, owner[part]),)

        return self._memory.ask(ask, len(slots))[0]


def _examine(model: Model, corruption: Corruption, probes: Tensor, x: Tensor, owner: Tensor) -> int:
    """Return the number of classes of a model that answers about each image alone, the same each time."""
    if is_stochastic(model):
        raise CannotCertify(
            f"{type(model).__name__} is stochastic: smoothing needs a base classifier whose answers do not differ "
            "between calls; certify the net inside"
        )
    try:
        first = answer(lambda copies: corruption.ask(model, copies, x, owner), probes)
        again = corruption.ask(model, probes, x, owner)
    except RuntimeError as error:
        reason = explain_mismatch(model, x)
        if reason is None:
            raise
        raise ValueError(reason) from error
    check_logits(first, probes)
    if first.shape[1] < 2:
        raise ValueError(f"a vote needs at least 2 classes, the model returns {first.shape[1]} logit")
    half = slice(0, PROBES // 2)
    alone = corruption.ask(model, probes[half], x, owner[half])
    if not _agree(first, again):
        raise ValueError("two calls of the model differ on the same images: it is stochastic or keeps a state")
    if not _agree(first[half], alone):
        raise ValueError("the model's answer about an image depends on the other images of the batch")
    return int(first.shape[1])


def _agree(one: Tensor, other: Tensor) -> bool:
    return bool(((one - other).abs().nan_to_num(0, 0) <= AGREEMENT * _size(one)).all())


def _size(logits: Tensor) -> Tensor:
    """Return the size () of logits (B, K): the largest that can decide, or the median of those that are not 0.

    Not the largest of all, for a class that is masked by -1e9 would hide every difference; not the median of all, which
    is 0 where most logits are cut at 0, and next to 0 where they are probabilities.
    """
    finite = logits.nan_to_num(0, 0, 0)
    return torch.fmax(finite.topk(2, dim=1).values.abs().amax(), finite[finite != 0].abs().median())
