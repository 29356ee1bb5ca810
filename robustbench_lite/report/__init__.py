"""Tables: from the summary of an evaluation to the screen, CSV, Markdown and LaTeX. Nothing here imports torch."""

from robustbench_lite.report.export import to_csv, to_latex, to_markdown, write_tables
from robustbench_lite.report.sheet import Cell, Sheet, rank, sheets, table_of
from robustbench_lite.report.table import to_screen

__all__ = [
    "Cell",
    "Sheet",
    "rank",
    "sheets",
    "table_of",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_screen",
    "write_tables",
]
