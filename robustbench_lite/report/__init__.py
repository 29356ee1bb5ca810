"""Tables: from the summary of an evaluation to the screen, CSV, JSON, Markdown, LaTeX. Nothing here imports torch."""

from robustbench_lite.report.changes import changes_sheet
from robustbench_lite.report.export import FORMATS, to_csv, to_json, to_latex, to_markdown, write_tables
from robustbench_lite.report.published import load_published, model_info, write_cards
from robustbench_lite.report.sheet import Cell, Sheet, rank, sheets, table_of
from robustbench_lite.report.table import to_screen

__all__ = [
    "FORMATS",
    "Cell",
    "Sheet",
    "changes_sheet",
    "load_published",
    "model_info",
    "rank",
    "sheets",
    "table_of",
    "to_csv",
    "to_json",
    "to_latex",
    "to_markdown",
    "to_screen",
    "write_cards",
    "write_tables",
]
