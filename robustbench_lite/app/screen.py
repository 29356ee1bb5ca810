"""What commands say on the standard output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from robustbench_lite.app.console import console
from robustbench_lite.report.sheet import Sheet, sheets, table_of
from robustbench_lite.report.table import to_screen

if TYPE_CHECKING:
    from robustbench_lite.evaluation.report import Report

__all__ = ["show_not_applicable", "show_report", "show_sheet", "show_unfinished"]


def show_sheet(sheet: Sheet) -> None:
    """Print a table."""
    screen = console()
    screen.print(to_screen(sheet, screen.width))


def show_not_applicable(report: Report, defense: str = "") -> None:
    """Print why methods are n/a, where they gave a reason; one that another threat is meant for needs none."""
    of, ran = f" for {defense}" if defense else "", set(report.records["method"])
    meant, told = report.elsewhere, [part for part in report.not_applicable if part.reason]
    missing = [part for part in told if part.method not in ran | meant.get((part.threat, part.eps), set())]
    for method, reason in dict.fromkeys((part.method, part.reason) for part in missing):
        console().print(Text(f"{method}: n/a{of}: {reason}"), highlight=False)


def show_unfinished(report: Report, defense: str) -> None:
    """Print what was left open; a report alone shows it as flags."""
    for part in report.unfinished:
        console().print(Text(f"{defense}: {part}", style="yellow"), highlight=False)


def show_report(report: Report) -> None:
    """Print the table of a report, and why its figures may be doubted."""
    for sheet in sheets([table_of(report)]):
        show_sheet(sheet)
    screen = console()
    show_not_applicable(report)
    for flag in report.flags:
        screen.print(Text.assemble(("flag ", "yellow"), (flag.id, "bold"), f": {flag.evidence}; {flag.remedy}"))
    for violation in report.violations:
        screen.print(Text.assemble(("invalid ", "bold red"), (violation.id, "bold"), f": {violation.evidence}"))
    for finding in report.findings:
        screen.print(Text.assemble(("finding ", "dim"), (finding.id, "bold"), f": {finding.evidence}"))
    for remark in report.remarks:
        screen.print(Text(f"note: {remark}"), highlight=False)
    for warning in report.warnings:
        screen.print(Text(f"store: {warning}", style="yellow"))
