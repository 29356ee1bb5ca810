"""Prints the table of methods from the registry: python docs/methods.py > docs/methods.md."""

from __future__ import annotations

from robustbench_lite import zoo
from robustbench_lite.app.listing import GROUPS, entries


def page() -> str:
    """Return docs/methods.md."""
    lines = ["# Methods", "", "Made by `python docs/methods.py > docs/methods.md`; the same as `rbl list GROUP`."]
    for group, (_, what) in GROUPS.items():
        lines += [
            "",
            f"## {group}",
            "",
            f"{what[0].upper()}{what[1:]}.",
            "",
            "| name | what | settings |",
            "|---|---|---|",
        ]
        lines += [f"| `{e.name}` | {e.summary} | {e.settings.replace('|', ', ')} |" for e in entries(group)]
    lines += [
        "",
        "## zoo",
        "",
        "Trained defenses: `defense=NAME`, `load_defense(NAME)`.",
        "",
        "| name | what | source |",
    ]
    lines += ["|---|---|---|", *(_row(name) for name in zoo.names())]
    return "\n".join(lines) + "\n"


def _row(name: str) -> str:
    card = zoo.card(name)
    return f"| `{name}` | {card['defense']} | {card['source']} |"


if __name__ == "__main__":
    print(page(), end="")
