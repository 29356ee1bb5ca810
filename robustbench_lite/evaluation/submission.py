"""External evidence: adversarial examples that somebody hands in, judged from scratch, kept where they beat the store.

Nothing of a submission is taken on trust. Each input is held against the images at hand, whose hashes are those in the
store; it must be finite, within the image bounds and in the threat; and the deployed defense, asked afresh, must be
wrong there, a randomised one in most of many fresh draws, as `core.oracle` has it. What the store knows already is not
written again: an example counts as new where the sample stood, or where it lies nearer than the nearest one known.

    STORE/cells/<cell>/...                     rows of status "submitted", and the examples
    STORE/submissions/<model>-<data>-<id>.json who handed it in, when, and what became of each input
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Threat
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation.cells import Cell
from robustbench_lite.evaluation.examples import Examples, by_group
from robustbench_lite.evaluation.files import put
from robustbench_lite.evaluation.handed import Handed, Known, Submitted
from robustbench_lite.evaluation.methods import attack_method
from robustbench_lite.evaluation.records import SCHEMA, SUBMITTED
from robustbench_lite.evaluation.samples import Samples, as_samples
from robustbench_lite.evaluation.specs import spec
from robustbench_lite.evaluation.store import Store
from robustbench_lite.evaluation.subject import Subject

__all__ = ["Input", "Submission", "submit"]

_BATCH = 250
_ROUNDS = 10  # votes on a randomised defense begin where one draw fooled it: no example shall fail by that draw alone
_CLOSER = 1e-6  # by how much nearer, relatively, an example must lie to be news


@dataclass(frozen=True)
class Input:
    """What became of one input.

    Attributes:
        index: of its sample.
        holds: whether it is an adversarial example.
        new: whether it beats what the store knew, and was recorded.
        reason: in words.
        distance: of the example, in the threat's measure; None where it does not hold.
    """

    index: int
    holds: bool
    new: bool
    reason: str
    distance: float | None = None


@dataclass(frozen=True)
class Submission:
    """What became of a submission.

    Attributes:
        inputs: one entry for each, in their order.
        cell: the folder of the rows that were recorded; None where there are none.
    """

    inputs: list[Input] = field(default_factory=list)
    cell: str | None = None

    @property
    def holding(self) -> int:
        """How many inputs are adversarial examples."""
        return sum(entry.holds for entry in self.inputs)

    @property
    def new(self) -> int:
        """How many beat the store."""
        return sum(entry.new for entry in self.inputs)


def submit(
    model: Any,
    data: Dataset | tuple[Tensor, Tensor],
    threat: Threat,
    handed: Handed,
    store: Store | Path | str,
    *,
    name: str | None = None,
    seed: int = 0,
    precision: str = "auto",
    device: str = "auto",
) -> Submission:
    """Judge what somebody hands in, and record what beats the store.

    Args:
        model: the deployed defense.
        data: the images that the indices count.
        threat: with a budget; the rows of the store under this very threat are what there is to beat.
        handed: the inputs.
        store: a store that holds an evaluation of this model under this threat.
        name: what tables call the model; default: its class.
        seed: of the evaluation whose row the examples count in.
        precision: of that evaluation; "auto": the model's.
        device: as in `evaluate`.

    Raises:
        ValueError: inputs of another shape than the images, or a threat without a budget.
        StoreError: there is no such store, it cannot be written, or it has not evaluated this model under this threat.
    """
    if threat.size is None:
        raise ValueError(f"give {threat.name} a number as eps: it says which row of the table to beat")
    opened = store if isinstance(store, Store) else Store(store)
    samples, subject = as_samples(data, threat.bounds), Subject.of(model, name, device, precision)
    _check_shapes(handed, samples, threat)
    cell = _cell(subject, samples.name, threat, handed, seed)
    known = Known.of(opened, cell)
    opened.require_writable()
    chosen, entries = _looked_at(handed, samples, known)
    kept: list[tuple[pa.Table, Examples]] = []
    for start in range(0, len(chosen), _BATCH):
        kept += _judged(chosen[start : start + _BATCH], handed, samples, threat, subject, cell, known, entries)
    found = Submission([entries[place] for place in range(len(handed.index))], cell.key if kept else None)
    _keep(opened, cell, kept, str(subject.device))
    _report(opened, cell, handed, found)
    return found


@dataclass(frozen=True)
class _Replay(Attack):
    """Offers one given point for each sample of a batch, and nothing else."""

    points: Tensor = field(repr=False)

    @property
    def access(self) -> Access:
        return Access.LABEL

    def supports(self, threat: Threat) -> bool:
        return True

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        for _ in range(_ROUNDS if oracle.stochastic else 1):
            rows = oracle.standing(oracle.judge_cost)
            if len(rows):
                oracle.judge(self.points[rows], rows)
        return oracle.best


def _check_shapes(handed: Handed, samples: Samples, threat: Threat) -> None:
    shape = tuple(samples.x.shape[1:])
    if handed.x_adv.shape[1:] != shape:
        raise ValueError(f"x_adv must have shape (N, {', '.join(map(str, shape))}), got {handed.x_adv.shape}")
    if threat.parametric != (handed.parameters is not None):
        have = "needs" if threat.parametric else "takes no"
        raise ValueError(f"{threat.name} {have} array 'parameters': its budget bounds the parameters of the change")


def _cell(subject: Subject, dataset: str, threat: Threat, handed: Handed, seed: int) -> Cell:
    method = Submitted(handed.author, handed.source, handed.digest)
    return Cell(
        kind="attack",
        dataset=dataset,
        defense=subject.name,
        fingerprint=subject.fingerprint,
        threat=threat.name,
        eps=threat.size,
        threat_spec=spec(threat),
        method=method.title,
        method_spec=spec(method),
        version=method.version,
        seed=seed,
        precision=subject.precision,
    )


def _looked_at(handed: Handed, samples: Samples, known: Known) -> tuple[np.ndarray[Any, Any], dict[int, Input]]:
    """Return the positions of the inputs that can be judged, and what is wrong with the others."""
    places = {int(index): place for place, index in enumerate(samples.indices)}
    entries: dict[int, Input] = {}
    seen: set[int] = set()
    for place, index in enumerate(handed.index.tolist()):
        reason = _refused(place, index, handed, samples, places, known, seen)
        seen.add(index)
        if reason:
            entries[place] = Input(index, False, False, reason)
    return np.array([place for place in range(len(handed.index)) if place not in entries], dtype=np.int64), entries


def _refused(
    place: int, index: int, handed: Handed, samples: Samples, places: dict[int, int], known: Known, seen: set[int]
) -> str:
    if index in seen:
        return "its index comes twice; the first input counts"
    if index not in places:
        return f"the data have no sample {index}"
    image, label = samples.hashes[places[index]], int(samples.targets[places[index]])
    if handed.label is not None and int(handed.label[place]) != label:
        return f"its label is given as {int(handed.label[place])}, the data say {label}"
    if index not in known.hashes:
        return "the store has not evaluated this sample under this threat: evaluate it first"
    if known.hashes[index] != (image, label):
        return f"the image at hand ({image}, label {label}) is not the one that was evaluated {known.hashes[index]}"
    own = [array[place] for array in (handed.x_adv, handed.parameters) if array is not None]
    if not all(np.isfinite(array).all() for array in own):
        return "it is not finite"
    return ""


def _judged(
    places: np.ndarray[Any, Any],
    handed: Handed,
    samples: Samples,
    threat: Threat,
    subject: Subject,
    cell: Cell,
    known: Known,
    entries: dict[int, Input],
) -> Iterator[tuple[pa.Table, Examples]]:
    """Judge a batch, add to the entries, and yield the rows and examples that beat the store."""
    order = {int(index): row for row, index in enumerate(samples.indices)}
    part = samples.take(np.array([order[int(handed.index[place])] for place in places], dtype=np.int64))
    own = handed.x_adv if handed.parameters is None else handed.parameters
    points, x = subject.images(torch.from_numpy(own[places])), subject.images(part.x)
    low, high = threat.bounds
    images = subject.images(torch.from_numpy(handed.x_adv[places])).flatten(1)
    bounded = ((images >= low) & (images <= high)).all(dim=1).tolist()
    inside, distance = threat.contains(points, x).tolist(), threat.distance(points, x).tolist()
    rows, examples = attack_method(subject, _Replay(points), threat, None)(cell, part)
    success, far = rows["success"].to_pylist(), rows["distance"].to_pylist()
    new = []
    for row, place in enumerate(places.tolist()):
        index = int(part.indices[row])
        before = known.nearest.get(index, np.inf)
        if not bounded[row]:
            entry = Input(index, False, False, f"it leaves the image bounds [{low:g}, {high:g}]")
        elif not inside[row]:
            entry = Input(index, False, False, f"it lies outside the threat, at {distance[row]:.6g} of {threat.size:g}")
        elif before == 0:
            entry = Input(index, False, False, "the model is wrong on the clean image: there is nothing to break")
        elif not success[row]:
            entry = Input(index, False, False, f"the model answers {rows['prediction'][row]}, which is no success")
        elif far[row] < before * (1 - _CLOSER):
            what = "the sample stood so far" if before == np.inf else f"nearer than the nearest known, {before:.6g}"
            entry = Input(index, True, True, what, far[row])
        else:
            entry = Input(index, True, False, f"no nearer than the nearest known, {before:.6g}", far[row])
        entries[place] = entry
        new.append(entry.new)
    if any(new) and examples is not None:
        mask = np.array(new)
        chosen = rows.filter(pa.array(mask))
        column = SCHEMA.get_field_index("status")
        marked = pa.array([SUBMITTED] * len(chosen), type=pa.string())
        yield (
            chosen.set_column(column, SCHEMA.field(column), marked),
            examples.take(np.flatnonzero(np.isin(examples.index, part.indices[mask]))),
        )


def _keep(store: Store, cell: Cell, kept: list[tuple[pa.Table, Examples]], device: str) -> None:
    """Write rows and examples, group by group."""
    if not kept:
        return
    rows, examples = pa.concat_tables([table for table, _ in kept]), Examples.join([found for _, found in kept])
    for own, found in by_group(rows, examples):
        store.write(cell, own, found, device)


def _report(store: Store, cell: Cell, handed: Handed, found: Submission) -> None:
    """Keep who handed it in, and what became of it."""
    about = {"author": handed.author, "source": handed.source, "digest": handed.digest, "written": time.time_ns()}
    about |= {"defense": cell.defense, "threat": cell.threat, "eps": cell.eps, "cell": found.cell}
    content = about | {"inputs": [asdict(entry) for entry in found.inputs]}
    name = f"{cell.fingerprint}-{cell.dataset.replace('/', '%')}-{cell.key[:12]}"
    path = store.root / "submissions" / f"{name}.json"
    if found.new or not path.exists():  # handed in once more it is no news, and must not hide what was
        put(path, json.dumps(content, indent=1).encode())
