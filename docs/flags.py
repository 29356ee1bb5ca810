"""Prints the table of flags: python docs/flags.py > docs/flags.md."""

from __future__ import annotations

from robustbench_lite.evaluation.flags import FLAGS

HEAD = """# Flags

Made by `python docs/flags.py > docs/flags.md` from `robustbench_lite/evaluation/flags.py`.

A flag is a reason to doubt a row of the table. It stands in the report with its evidence (`report.flags`), and in the
table by its name. A row without flags whose attacks were compared with each other (`probed=True`; on the command line
`probed=true`) is `reliable`; one with a flag, or without the comparison, is `doubtful`.

| flag | raised if | remedy |
|---|---|---|"""


def page() -> str:
    """Return docs/flags.md."""
    return (
        "\n".join([HEAD, *(f"| `{name}` | {kind.raised_if} | {kind.remedy} |" for name, kind in FLAGS.items())]) + "\n"
    )


if __name__ == "__main__":
    print(page(), end="")
