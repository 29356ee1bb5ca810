"""Hydra callbacks: after a multirun, one table over its jobs, derived from the store."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from robustbench_lite.app import receipts, sweeps
from robustbench_lite.app.console import console
from robustbench_lite.app.errors import report_errors
from robustbench_lite.app.objective import check_objective, search_in_words
from robustbench_lite.app.screen import show_not_applicable, show_sheet, show_unfinished
from robustbench_lite.app.unkept import is_read_only, unkept
from robustbench_lite.report.export import write_tables
from robustbench_lite.report.sheet import Sheet, sheets, table_of

__all__ = ["TableCallback"]


class TableCallback(Callback):
    """Ranks the rows of a multirun in one table a threat, on the screen and in `STORE/tables`.

    It ends the command, by `SystemExit`: Hydra would turn any other exception of a callback into a warning. The status
    is 1 if a job failed, or a row is invalid or not finished.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a sweep that would keep nothing to make a table of."""
        with report_errors() as outcome:
            if not config.store and not config.forecast:
                raise ValueError("a sweep needs a store, from which its table is made: give store=DIR")
            check_objective(config.objective)
        if outcome.status:
            raise SystemExit(outcome.status)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Show and write the tables, then name the jobs that failed; forecasts have shown theirs."""
        if config.forecast:
            return
        with report_errors() as outcome:
            folder, store = Path(config.hydra.sweep.dir), Path(config.store)
            told = search_in_words(folder, store, config.objective)
            outcome.status = _finish(folder, store, shown=not told)
            for line in told:
                console().print(line, highlight=False, soft_wrap=True)
        raise SystemExit(outcome.status)


def _finish(folder: Path, store: Path, shown: bool = True) -> int:
    failed, reports, shards = [], [], 0
    for ended, receipt in sweeps.outcomes(folder):
        report = receipts.report_of(receipt, store) if receipt else None
        if report is not None:
            reports.append((receipt.defense if receipt else "", report))
            failed += [ended] if ended.error else []
        elif ended.shard and not ended.error:
            shards += 1
        else:
            failed.append(ended)
    found = list(sheets(table_of(report) for _, report in reports))
    for sheet in found if shown else []:  # a search has a method a trial: a table as wide as it is long
        show_sheet(sheet)
    for defense, report in reports:
        show_not_applicable(report, defense)
        show_unfinished(report, defense)
    lost = not _written(found, store / "tables")
    if failed:
        _say_failed(failed, folder)
    else:
        sweeps.forget(folder)
    if shards and not reports and not failed:
        print(f"{shards} shards are in the store; without shard=... the command shows the whole", file=sys.stderr)
    invalid = any(report.verdict == "invalid" or report.unfinished for _, report in reports)
    return int(bool(failed) or invalid or lost)


def _say_failed(failed: list[sweeps.Ended], folder: Path) -> None:
    """Name the jobs that failed, and show each traceback once: a hundred shards may fail for one reason."""
    alike: dict[str, list[sweeps.Ended]] = {}
    for ended in failed:
        alike.setdefault(re.sub(r"\d+", "", ended.traceback), []).append(ended)  # but for the numbers of samples
    for group in alike.values():
        print(group[0].traceback.rstrip(), file=sys.stderr)
        for ended in group:
            print(f"failed: {ended.name}: {ended.error or 'its rows are no longer in the store'}", file=sys.stderr)
    places = " and ".join(place.as_posix() for place in sweeps.places(folder))
    print(f"{len(failed)} failed (kept in {places}); run the command again to compute what is missing", file=sys.stderr)


def _written(found: list[Sheet], folder: Path) -> bool:
    """Write the tables, say where, and return whether none was lost to a full disk."""
    screen = console()
    for sheet in found:
        try:
            paths = write_tables(sheet, folder)
        except OSError as error:
            only_read = is_read_only(error)
            print(f"{'note' if only_read else 'error'}: {unkept('the tables', error)}", file=sys.stderr)
            return only_read
        endings = ",".join(path.suffix.removeprefix(".") for path in paths)
        stem = paths[0].with_suffix("").as_posix()
        screen.print(f"written: {stem}.{{{endings}}}", style="dim", highlight=False, soft_wrap=True)
    return True
