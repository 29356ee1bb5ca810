"""The harness: one model, some samples, some threats, some methods; one honest row a threat.

Work goes unit by unit (`units.py`; some 500 samples), on each method by method: clean answers, attacks in the order
given, certifiers, audit; in a cascade cheap proofs come first; under a budget, what pays (`budget.py`). What the store
holds is taken from it row by row, the rest is computed and added. What fails or is cut off is left open and named.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
from torch import Tensor

from robustbench_lite.core.threats import Threat
from robustbench_lite.evaluation import audit as audits
from robustbench_lite.evaluation.budget import Budget, Purse
from robustbench_lite.evaluation.cells import Cell
from robustbench_lite.evaluation.flags import Flag, non_finite, unfinished
from robustbench_lite.evaluation.handed import outsiders, with_submitted
from robustbench_lite.evaluation.ledger import Ledger
from robustbench_lite.evaluation.notes import Run
from robustbench_lite.evaluation.plan import MODES, Plan, Task, with_own
from robustbench_lite.evaluation.records import empty_records, to_frame
from robustbench_lite.evaluation.report import NotApplicable, Report
from robustbench_lite.evaluation.runner import InProcess, Runner, TimeLimitError
from robustbench_lite.evaluation.samples import Samples, as_samples
from robustbench_lite.evaluation.shards import check_shard, check_shards, share
from robustbench_lite.evaluation.store import Store
from robustbench_lite.evaluation.subject import Subject
from robustbench_lite.evaluation.unfinished import ERROR, TIME_LIMIT, EvaluationError, Unfinished
from robustbench_lite.evaluation.units import Unit, cut, unit_after_unit, what_pays_first
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
    time_limit: float | None = None,
    budget: Budget | None = None,
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
            other draws in each batch, so that its answers depend on how the work is cut. A batch that does not fit in
            memory is halved.
        device: "auto": where the model is, or a GPU if there is one (the model is copied, not moved).
        max_queries: forward passes that an attack may spend on each sample; None for no limit.
        time_limit: seconds that one method may take at a time, which is for what is missing of some 500 samples
            (under a budget: first for 16 of them, then for the others). It runs in a worker process and is killed,
            whatever it does; finished batches are kept, the other samples have no rows of it. None: no limit, and no
            worker.
        budget: forward passes or minutes that this run may take; it goes to what pays, the rest is not run.
        precision: "auto": the model's; "float32" or "float64" convert a copy of the model.
        shard: (number, of how many): compute only the rows of this share of the samples (evaluation/shards.py), perhaps
            none; several processes fill one store so. The report holds these rows, without first look, probe or
            witnesses: an evaluation without `shard` on the same store then finds all rows there, and judges the whole.
        progress: show a progress bar.

    Raises:
        TypeError: a model, images, labels, methods or a seed of the wrong type.
        ValueError: a model in train mode, images out of bounds, labels without a logit, a threat without a budget,
        the same method twice ...; the message says what to do. StoreError: the store cannot be written, or a newer
        version of this package has written it. EvaluationError: a method failed on some batch; the message names
        defense, method and samples. All else was evaluated and kept, and is in the error's `report`. UnsavedError: the
        disk was full; what could not be written is in the error's `report` alone. What a time limit or a budget left
        open is no error: `report.unfinished` names it, and the rows of the table are flagged.
    """
    _check(seed, mode, audit, batch_size, time_limit)
    if shard is not None and budget is not None and budget.limited:
        raise ValueError("give a budget or a shard, not both: each shard would spend the whole budget")
    threats, attacks, certifiers = (
        _listed("threat", threat),
        _listed("attacks", attacks),
        _listed("certifiers", certifiers),
    )
    if adaptive:
        attacks, certifiers = with_own(model, threats, attacks, certifiers)
    plan = Plan.of(threats, attacks, certifiers, max_queries)
    samples = as_samples(data, plan.bounds).in_batches(batch_size)
    subject = Subject.of(model, name, device, precision)
    if shard is not None:
        check_shards(shard[1])
        check_shard(*shard)
        samples = samples.take(share(samples.unit if mode == "cascade" else samples.batch, *shard))
    opened = store if isinstance(store, Store) or store is None else Store(store)
    with closing(_runner(subject, plan, samples.name, seed, time_limit)) as runner:
        notes = [] if shard else _looked(runner, samples, seed, subject.name)
        ledger = Ledger(opened, str(subject.device), batch_size, runner, Purse(budget or Budget()))
        tasks, witnesses = plan.tasks(subject, samples.name, seed), Witnesses(ledger)

        def done(unit: Unit) -> None:
            if shard:
                ledger.forget(unit.number)
            else:
                witnesses.collect(unit.part, _joined([unit.tables], tasks, ledger), [task.cell for task in tasks])

        turns = what_pays_first if budget is not None and budget.limited else unit_after_unit
        tables = turns(cut(samples, progress), tasks, ledger, audit if mode == "cascade" else None, done)
        records = to_frame(_joined(tables, tasks, ledger))
        refused = [_refused(task.cell, ledger) for task in tasks if task.cell.key in ledger.refused]
        if shard:
            return _delivered(Report(records, plan.names, [], [], [], [*plan.not_applicable, *refused]), ledger)
        _check_answered(records, ledger)
        for judged in threats if probed else []:
            notes += _probed(ledger, samples, judged, _fallen(records, judged), seed)
    _keep_slice(tasks[0].cell, samples, int((records["kind"] == "clean").sum()), plan, ledger)
    return _report(records, plan, refused, notes, ledger, witnesses)


def _check(seed: int, mode: str, audit: float, batch_size: int, time_limit: float | None) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be a whole number, an int, got {seed!r}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not 0 <= audit <= 1:
        raise ValueError(f"audit is a share of the samples, between 0 and 1, got {audit}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit must be a positive number of seconds, or None for no limit, got {time_limit}")


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


def _runner(subject: Subject, plan: Plan, dataset: str, seed: int, time_limit: float | None) -> Runner:
    if time_limit is None:
        return InProcess(subject)
    from robustbench_lite.evaluation.watchdog import Watchdog

    return Watchdog(subject, plan, dataset, seed, time_limit)


def _looked(runner: Runner, samples: Samples, seed: int, name: str) -> list[Flag]:
    """Take a first look; a model that does not answer in time cannot be evaluated."""
    runner.begin()
    try:
        return runner.look(samples, seed)
    except TimeLimitError as error:
        raise EvaluationError(f"{name} does not answer about a few clean images in time: {error}") from error


def _joined(tables: list[dict[str, pa.Table]], tasks: list[Task], ledger: Ledger) -> pa.Table:
    """Return the records of units, cell by cell, without those of methods that turned out not to apply."""
    keys = [task.cell.key for task in tasks if task.cell.key not in ledger.refused]
    return pa.concat_tables([empty_records(), *(unit[key] for key in keys for unit in tables)])


def _check_answered(records: pd.DataFrame, ledger: Ledger) -> None:
    """Refuse to make a table of nothing.

    Raises:
        EvaluationError: the model has answered about no sample.
    """
    if len(records) == 0:
        raise EvaluationError("; ".join(part.detail for part in ledger.unfinished))


def _probed(ledger: Ledger, samples: Samples, threat: Threat, fallen: set[int], seed: int) -> list[Flag]:
    """Compare attacks with each other; without that a row is doubtful, but it is not lost."""
    ledger.runner.begin()
    try:
        return ledger.runner.probe(samples, threat, fallen, seed)
    except Exception as error:
        late = isinstance(error, TimeLimitError)
        detail = str(error) if late else f"{type(error).__name__}: {error}"
        told = "" if late else "".join(traceback.format_exception(error))
        reason, name = TIME_LIMIT if late else ERROR, "probe"
        part = Unfinished(threat.name, threat.size, name, name, len(samples), reason, detail, told)
        ledger.leave(f"{name} {threat.name} {threat.size}", -1, part)
        return []


def _fallen(records: pd.DataFrame, threat: Threat) -> set[int]:
    rows = records[
        (records["threat"] == threat.name) & (records["eps"] == threat.size) & records["success"].fillna(False)
    ]
    return set(rows["index"].tolist())


def _keep_slice(clean: Cell, samples: Samples, answered: int, plan: Plan, ledger: Ledger) -> None:
    """Say in the store which samples belong together; one that can only be read does without if it is complete."""
    if ledger.store is None:
        return
    try:
        ledger.store.put_slice(clean, samples, plan.names, complete=answered == len(samples))
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
    store = ledger.store
    records = records if store is None else with_submitted(store, records, plan.names)
    broken, found = non_finite(records), witnesses.attach(audits.audit(records))
    if store is not None:
        first, left = records.iloc[0], _left(ledger)
        run = Run(
            tuple(plan.names), int(first["seed"]), str(first["precision"]), int((records["kind"] == "clean").sum())
        )
        try:
            told = [asdict(note) for note in (*notes, *left)]
            store.put_flags(str(first["fingerprint"]), str(first["dataset"]), told, run)
        except OSError as error:
            ledger.unsaved.append(f"flags: {error}")
    report = Report(
        records,
        plan.names,
        [*notes, *([broken] if broken else []), *outsiders(records), *_left(ledger)],
        found.violations,
        found.findings,
        [*plan.not_applicable, *refused],
    )
    return _delivered(report, ledger)


def _left(ledger: Ledger) -> list[Flag]:
    parts = ((part, unfinished(part)) for part in ledger.unfinished)
    return [replace(flag, threat=part.threat or "", eps=part.eps) for part, flag in parts if flag]


def _delivered(report: Report, ledger: Ledger) -> Report:
    """Return the report with what happened on the way, and say what failed, and what could not be written.

    Raises:
        EvaluationError: a method failed.
        UnsavedError: something could not be written.
    """
    damaged = [] if ledger.store is None else list(ledger.store.warnings)
    left, remarks = ledger.unfinished, list(ledger.remarks.values())
    report = replace(report, warnings=damaged, unsaved=ledger.unsaved, unfinished=left, remarks=remarks)
    lost = f"{len(report.unsaved)} parts could not be kept: {'; '.join(report.unsaved)}" if report.unsaved else ""
    failed = [part.detail for part in left if part.reason == ERROR]
    if failed:
        rest = f", but {lost}" if lost else "; run again to compute what is missing"
        raise EvaluationError(f"{'; '.join(failed)}; the rest is complete{rest}", report)
    if lost:
        raise UnsavedError(f"the evaluation is complete, but {lost}", report)
    return report
