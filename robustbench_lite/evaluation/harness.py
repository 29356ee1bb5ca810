"""The harness: one model, some samples, some threats, some methods; one honest row a threat.

Work goes block by block (500 dataset indices), in each block method by method: clean answers, attacks in the order
given, certifiers, audit; in a cascade cheap proofs come first. What the store holds is taken from it row by row, the
rest is computed and added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from torch import Tensor

from robustbench_lite.core.threats import Threat
from robustbench_lite.evaluation import audit as audits
from robustbench_lite.evaluation.cascade import cascade
from robustbench_lite.evaluation.cells import Cell, block_of
from robustbench_lite.evaluation.first_look import first_look
from robustbench_lite.evaluation.flags import Flag, non_finite
from robustbench_lite.evaluation.ledger import Ledger
from robustbench_lite.evaluation.plan import MODES, Plan, Task, with_own
from robustbench_lite.evaluation.probe import probe
from robustbench_lite.evaluation.records import empty_records, to_frame
from robustbench_lite.evaluation.report import NotApplicable, Report
from robustbench_lite.evaluation.samples import Samples, as_samples
from robustbench_lite.evaluation.shards import check_shard, check_shards, share
from robustbench_lite.evaluation.store import Store
from robustbench_lite.evaluation.subject import Subject
from robustbench_lite.evaluation.witnesses import Witnesses

if TYPE_CHECKING:
    from pathlib import Path

    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.certify.base import Certifier
    from robustbench_lite.data.base import Dataset

__all__ = ["UnsavedError", "evaluate"]


class UnsavedError(OSError):
    """The evaluation is complete, but some of it could not be written. `report` holds everything."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def evaluate(
    model: Any,
    data: Dataset | tuple[Tensor, Tensor],
    threat: Threat | Sequence[Threat],
    attacks: Iterable[Attack] = (),
    certifiers: Iterable[Certifier] = (),
    *,
    store: Store | Path | str | None = None,
    seed: int = 0,
    mode: str = "full",
    audit: float = 0.05,
    probed: bool = False,
    adaptive: bool = True,
    name: str | None = None,
    batch_size: int = 250,
    device: str = "auto",
    max_queries: int | None = None,
    precision: str = "auto",
    shard: tuple[int, int] | None = None,
    progress: bool = False,
) -> Report:
    """Evaluate a model under one or several threats, each judged alone.

    The model is left as it was; a defense is attacked as deployed, through its `attack_view` if it has one.

    Args:
        model: images (B, C, H, W) to logits (B, K): a module in eval mode, or any callable with a `name`.
        data: a data set, or (images, labels).
        threat: what the adversary may do; a list of threats gives one row of the table each.
        attacks: in the order they run, cheap ones first.
        certifiers: likewise.
        store: a folder that keeps the rows; what it holds is not computed again. None: nothing is kept.
        seed: of all randomness.
        mode: "full": each method sees all samples. "cascade": cheap proofs first, attacks only on what still stands and
            no deterministic certificate of the threat covers (evaluation/cascade.py).
        audit: in a cascade, the share of the samples that are attacked although they are proven.
        probed: whether attacks are compared with each other on 256 samples first (evaluation/probe.py); without that a
            verdict is at best "doubtful".
        adaptive: whether the defense's own `adaptive_attacks` and `certifiers` join the given ones; without them the
            table shows what an attacker finds who does not know the defense.
        name: what tables call the model; default: its class.
        batch_size: samples in one call of a method; it changes answers by rounding at most, but a stochastic model has
            other draws in each batch, so that its answers depend on how the work is cut.
        device: "auto": where the model is, or a GPU if there is one (the model is copied, not moved).
        max_queries: forward passes that an attack may spend on each sample; None for no limit.
        precision: "auto": the model's; "float32" or "float64" convert a copy of the model.
        shard: (number, of how many): compute only the rows of this share of the samples (evaluation/shards.py), perhaps
            none; several processes fill one store so. The report holds these rows, without first look, probe or
            witnesses: an evaluation without `shard` on the same store then finds all rows there, and judges the whole.
        progress: show a progress bar.

    Raises:
        TypeError: a model, images, labels or methods of the wrong type.
        ValueError: a model in train mode, images out of bounds, labels without a logit, a threat without a budget,
        the same method twice ...; the message says what to do. StoreError: the store cannot be written, or a newer
        version of this package has written it. EvaluationError: a method failed; the message names defense, method
        and block. Finished blocks are kept. UnsavedError: the disk was full; what could not be written is in the
        error's `report` alone.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not 0 <= audit <= 1:
        raise ValueError(f"audit is a share of the samples, between 0 and 1, got {audit}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    threats, attacks, certifiers = (
        _listed("threat", threat),
        _listed("attacks", attacks),
        _listed("certifiers", certifiers),
    )
    if adaptive:
        attacks, certifiers = with_own(model, threats, attacks, certifiers)
    plan = Plan.of(threats, attacks, certifiers, max_queries)
    samples = as_samples(data, plan.bounds)
    subject = Subject.of(model, name, device, precision)
    if shard is not None:
        check_shards(shard[1])
        check_shard(*shard)
        samples = samples.take(share(samples.indices, *shard, batch_size))
    notes = [] if shard else first_look(subject, samples, seed)
    opened = store if isinstance(store, Store) or store is None else Store(store)
    ledger = Ledger(opened, str(subject.device), batch_size)
    tasks, witnesses = plan.tasks(subject, samples.name, seed), Witnesses(ledger)
    tables: dict[str, list[pa.Table]] = {task.cell.key: [] for task in tasks}
    for part in _blocks(samples, progress):
        _block(part, tasks, audit if mode == "cascade" else None, subject, ledger, tables)
        if shard:
            ledger.forget()
            continue
        rows = to_frame(pa.concat_tables([parts[-1] for parts in tables.values()]))
        witnesses.collect(part, rows, [task.cell for task in tasks])
    answered = [parts for key, parts in tables.items() if key not in ledger.refused]
    records = to_frame(pa.concat_tables([empty_records(), *(table for parts in answered for table in parts)]))
    refused = [_refused(task.cell, ledger) for task in tasks if task.cell.key in ledger.refused]
    if shard:
        return _delivered(Report(records, plan.names, [], [], [], [*plan.not_applicable, *refused]), ledger)
    for judged in threats if probed else []:
        notes += probe(subject, samples, judged, _fallen(records, judged), seed)
    _keep_slice(subject, samples, ledger)
    return _report(records, plan, refused, notes, ledger, witnesses)


def _listed(what: str, given: Any) -> list[Any]:
    """Return threats or methods as a list.

    Raises:
        TypeError: one method where several are meant, or a name in place of an object.
    """
    if what == "threat" and isinstance(given, Threat):
        return [given]
    if isinstance(given, str) or not isinstance(given, Iterable):
        hint = "such as Lp('linf', '8/255')" if what == "threat" else f"write {what}=[...]"
        kind = "a threat or a list of threats" if what == "threat" else f"a list of {what}"
        raise TypeError(f"{what} must be {kind}, got {given!r}: {hint}")
    return list(given)


def _blocks(samples: Samples, progress: bool) -> Iterable[Samples]:
    """Yield the samples of each block, in the order of their indices."""
    numbers = block_of(samples.indices)
    order = [np.flatnonzero(numbers == b) for b in np.unique(numbers)]
    parts = (samples.take(rows[np.argsort(samples.indices[rows], kind="stable")]) for rows in order)
    if not progress:
        return parts
    from rich.progress import track

    return track(parts, description="evaluating", total=len(order))


def _block(
    part: Samples,
    tasks: list[Task],
    audit: float | None,
    subject: Subject,
    ledger: Ledger,
    tables: dict[str, list[pa.Table]],
) -> None:
    """Run all tasks on one block, and add one table to those of each cell; without an audit all on all samples."""
    clean = ledger.fetch(tasks[0], part)
    tables[tasks[0].cell.key].append(clean)
    for threat in dict.fromkeys(task.threat for task in tasks[1:]):
        own = [task for task in tasks[1:] if task.threat == threat]
        if audit is None:
            found = [ledger.fetch(task, part) for task in own]
        else:
            found = cascade(part, own, subject, ledger, clean, audit, tasks[0].cell.seed)
        for task, table in zip(own, found, strict=True):
            tables[task.cell.key].append(table)


def _fallen(records: pd.DataFrame, threat: Threat) -> set[int]:
    rows = records[
        (records["threat"] == threat.name) & (records["eps"] == threat.size) & records["success"].fillna(False)
    ]
    return set(rows["index"].tolist())


def _keep_slice(subject: Subject, samples: Samples, ledger: Ledger) -> None:
    """Say in the store which samples belong together; one that can only be read does without if it is complete."""
    if ledger.store is None:
        return
    try:
        ledger.store.put_slice(subject.fingerprint, samples.name, samples)
    except OSError as error:
        ledger.unsaved += [f"the list of samples: {error}"] if ledger.wrote else []


def _refused(cell: Cell, ledger: Ledger) -> NotApplicable:
    return NotApplicable(str(cell.threat), cell.eps, cell.kind, cell.method, ledger.refused[cell.key])


def _report(
    records: pd.DataFrame,
    plan: Plan,
    refused: list[NotApplicable],
    notes: list[Flag],
    ledger: Ledger,
    witnesses: Witnesses,
) -> Report:
    """Audit the whole and keep the flags."""
    store, broken, found = ledger.store, non_finite(records), witnesses.attach(audits.audit(records))
    if store is not None:
        first = records.iloc[0]
        try:
            store.put_flags(str(first["fingerprint"]), str(first["dataset"]), [asdict(note) for note in notes])
        except OSError as error:
            ledger.unsaved.append(f"flags: {error}")
    report = Report(
        records,
        plan.names,
        [*notes, *([broken] if broken else [])],
        found.violations,
        found.findings,
        [*plan.not_applicable, *refused],
    )
    return _delivered(report, ledger)


def _delivered(report: Report, ledger: Ledger) -> Report:
    """Return the report with what was damaged in the store, and say what could not be written.

    Raises:
        UnsavedError: something could not.
    """
    damaged = [] if ledger.store is None else list(ledger.store.warnings)
    report = replace(report, warnings=damaged, unsaved=ledger.unsaved)
    if ledger.unsaved:
        lost = "; ".join(ledger.unsaved)
        raise UnsavedError(
            f"the evaluation is complete, but {len(ledger.unsaved)} parts could not be kept: {lost}", report
        )
    return report
