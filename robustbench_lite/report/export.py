"""Sheets as files: CSV and JSON with every digit, Markdown and LaTeX as on the screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from robustbench_lite.core.files import write_atomically
from robustbench_lite.report.sheet import TEXT_COLUMNS, Cell, Sheet

__all__ = ["FORMATS", "to_csv", "to_json", "to_latex", "to_markdown", "write_tables"]

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def to_csv(sheet: Sheet) -> str:
    """Return the rows of the summary with their rank: shares in [0, 1], every digit, empty where not applicable."""
    whole = {name: sheet.frame[name].astype("Int64") for name in ("rank",) if name in sheet.frame}
    return sheet.frame.assign(**whole).to_csv(index=False, lineterminator="\n")


def to_json(sheet: Sheet) -> str:
    """Return title and rows as JSON: shares in [0, 1], every digit, null where not applicable."""
    rows = [{str(name): _plain(value) for name, value in row.items()} for row in sheet.frame.to_dict("records")]
    return json.dumps({"title": sheet.title, "rows": rows}, indent=1, allow_nan=False) + "\n"


def to_markdown(sheet: Sheet) -> str:
    """Return a Markdown table in per cent, with 95 % intervals in brackets."""
    lines = [
        _markdown_line([_markdown(header) for header in sheet.headers]),
        _markdown_line([":--" if header in TEXT_COLUMNS else "--:" for header in sheet.headers]),
        *(_markdown_line([_markdown(_in_line(cell)) for cell in row]) for row in sheet.rows),
    ]
    return f"**{_markdown(sheet.title)}**\n\n" + "\n".join(lines) + "\n"


def to_latex(sheet: Sheet) -> str:
    """Return a LaTeX table (booktabs) in per cent, with 95 % intervals in small print."""
    columns = "".join("l" if header in TEXT_COLUMNS else "r" for header in sheet.headers)
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_latex(sheet.title)}. Accuracies in \\%, with exact 95\\,\\% intervals.}}",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        " & ".join(map(_latex, sheet.headers)) + r" \\",
        "\\midrule",
        *(" & ".join(map(_latex_cell, row)) + r" \\" for row in sheet.rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


FORMATS = {"csv": to_csv, "json": to_json, "md": to_markdown, "tex": to_latex}
"""What writes a sheet, by the ending of the file."""


def write_tables(sheet: Sheet, folder: Path) -> list[Path]:
    """Write `<slug>.csv`, `.json`, `.md` and `.tex` into a folder, each whole or not at all, and return their paths."""
    written = []
    for ending, text in FORMATS.items():
        path = folder / f"{sheet.slug}.{ending}"
        write_atomically(path, text(sheet).encode())
        written.append(path)
    return written


def _plain(value: Any) -> Any:
    if value is None or pd.isna(value):
        return None
    return value.item() if hasattr(value, "item") else value


def _in_line(cell: Cell) -> str:
    return f"{cell.text} [{cell.interval}]" if cell.interval else cell.text


def _markdown_line(parts: list[str]) -> str:
    return "| " + " | ".join(parts) + " |"


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("\n", " ")


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text.replace("\n", " "))


def _latex_cell(cell: Cell) -> str:
    interval = f" {{\\scriptsize [{_latex(cell.interval)}]}}" if cell.interval else ""
    return _latex(cell.text) + interval
