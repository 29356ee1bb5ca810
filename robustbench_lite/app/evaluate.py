"""`rbl evaluate`: attack and certify one defense; with `--multirun` several, and one table over them."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from robustbench_lite.app import sweeps
from robustbench_lite.app.console import console
from robustbench_lite.app.errors import explain
from robustbench_lite.app.forecast import forecast_job
from robustbench_lite.app.hydra_app import run
from robustbench_lite.app.jobs import Done, evaluate_job
from robustbench_lite.app.objective import value_of
from robustbench_lite.app.screen import show_report

__all__ = ["job", "main"]


def main(arguments: Sequence[str]) -> int:
    """Run `rbl evaluate`."""
    return run(job, "evaluate", arguments)


def job(config: DictConfig) -> float:
    """Evaluate one defense and return the exit status: 1 for an invalid row, or one that is not finished.

    Where a sweeper searches, that of a job that is done is its objective, a float.

    Alone it shows its table and raises what goes wrong. In a sweep it leaves its outcome in the sweep's folder, so that
    one failure does not end the others.
    """
    if config.forecast:
        return forecast_job(config)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return _sweep_job(config)
    if config.shards != 1 and config.shard is None:
        raise ValueError(
            f"shards={config.shards} makes jobs of a sweep: add --multirun; one of them alone: shard=0, shard=1 ..."
        )
    done = evaluate_job(config)
    if config.shard is not None and not done.served:
        return _say_shard(done, config)
    show_report(done.report)
    _say_where(done, config)
    return int(done.report.verdict == "invalid" or bool(done.problem))


def _sweep_job(config: DictConfig) -> float:
    hydra = HydraConfig.get()
    num, folder, overrides = int(hydra.job.num), Path(hydra.sweep.dir), list(hydra.overrides.task)
    sweeps.begin(folder, num)
    start, shard = time.perf_counter(), config.shard is not None
    try:
        done = evaluate_job(config, num)
        if done.receipt is None and not shard:
            raise RuntimeError(done.problem or "its rows cannot be read back from the store")
        answer = None if shard or config.objective is None else value_of(done.report, config.objective)
    except (Exception, SystemExit) as error:  # a net that exits has failed like any other
        message = explain(error) or f"{type(error).__name__}: {error}"
        sweeps.record(folder, sweeps.Ended(num, overrides, None, message, traceback.format_exc(), shard))
        print(f"  {' '.join(overrides)}: failed: {message}", file=sys.stderr, flush=True)
        return 1
    receipt = None if shard or done.receipt is None else asdict(done.receipt)
    told = "\n".join(part.traceback for part in done.report.unfinished if part.traceback)
    problem = done.problem if told or shard else ""
    sweeps.record(folder, sweeps.Ended(num, overrides, receipt, problem, told, shard))
    name = done.receipt.defense if done.receipt else f"{_subject(config)}, shard {config.shard} of {config.shards}"
    if done.problem or done.note:
        print(f"  {name}: {done.problem or done.note}", file=sys.stderr)
    how = "from the store" if done.served else f"{time.perf_counter() - start:.1f} s"
    print(f"  {name}: {how}", file=sys.stderr, flush=True)
    return int(bool(done.problem)) if answer is None or done.problem else answer


def _subject(config: DictConfig) -> str:
    return str(config.name or (config.defense or {}).get("name") or config.model._target_)


def _say_shard(done: Done, config: DictConfig) -> int:
    rows = len(done.report.records)
    console().print(f"shard {config.shard} of {config.shards}: {rows} rows kept in {config.store}", highlight=False)
    if done.problem:
        print(f"error: {done.problem}", file=sys.stderr)
    return int(bool(done.problem))


def _say_where(done: Done, config: DictConfig) -> None:
    if done.note:
        print(f"note: {done.note}", file=sys.stderr)
    if done.problem:
        print(f"error: {done.problem}", file=sys.stderr)
    elif config.store:
        how = "served from" if done.served else "kept in"
        console().print(f"rows {how} {config.store}", style="dim", highlight=False)
