"""`rbl list`: what there is, read from the config files and the sources without importing any of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from robustbench_lite import zoo
from robustbench_lite.app.console import console
from robustbench_lite.app.docstrings import summary_of
from robustbench_lite.core import registry
from robustbench_lite.core.errors import suggest

__all__ = ["GROUPS", "Entry", "entries", "main"]

GROUPS = {  # what users call a group: its folder in conf/, and what it is
    "attacks": ("attack", "search a threat for adversarial examples"),
    "certifiers": ("certifier", "prove that a threat holds none"),
    "defenses": ("defense", "objectives for rbl train, and the zoo's entries for rbl evaluate"),
    "threats": ("threat", "what the adversary may do"),
    "data": ("data", "data sets"),
    "models": ("model", "architectures"),
    "suites": ("suite", "attacks and certifiers that go together"),
    "experiments": ("experiment", "whole set-ups, each with its command"),
}


@dataclass(frozen=True)
class Entry:
    """One thing to choose: its name, what it is, and its settings with their defaults."""

    name: str
    summary: str
    settings: str


def main(arguments: Sequence[str]) -> int:
    """Run `rbl list [GROUP]`.

    Raises:
        ValueError: an unknown group, or more than one.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print("rbl list [GROUP]: without a group, the groups; with one, what it holds")
        return 0
    if len(arguments) > 1:
        raise ValueError(f"rbl list takes one group, got {' '.join(arguments)}")
    if not arguments:
        _show_groups()
        return 0
    name = _plural(arguments[0])
    _show(name, entries(name))
    if name == "defenses":
        _show("zoo", list(_zoo()))
    return 0


def entries(name: str) -> list[Entry]:
    """Return what a group holds, by its plural name."""
    group = GROUPS[name][0]
    return [_entry(group, config, file.read_text(encoding="utf-8")) for config, file in registry.groups(group).items()]


def _plural(name: str) -> str:
    for plural, (group, _) in GROUPS.items():
        if name in (plural, group):
            return plural
    raise ValueError(suggest(name, GROUPS, "group"))


def _entry(group: str, name: str, text: str) -> Entry:
    config = registry.load(group, name)
    heading = list(_heading(text))
    if heading and group == "experiment":
        return Entry(name, " ".join(heading[1:]), heading[0])
    target = config.get("_target_")
    summary = " ".join(heading) or (summary_of(target) if isinstance(target, str) else "")
    settings = ", ".join(_parts(config)) if "defaults" in config else ", ".join(_settings(config))
    return Entry(name, _first_sentence(summary), settings)


def _heading(text: str) -> Iterator[str]:
    """Yield the lines of the comment that a file starts with, package directives left out."""
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        content = line.lstrip("# ").strip()
        if content and not content.startswith("@package"):
            yield content


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[^l]\.) ", text, maxsplit=1)[0]  # not after "et al."


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping) and "_target_" in value:
            yield f"{prefix}{key}={str(value['_target_']).rpartition('.')[2]}"
        elif isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        elif key != "_target_":
            yield f"{prefix}{key}={_plain(value)}"


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and "usual_eps" in value:
        return "(usual for the data)"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parts(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the configs that a suite puts together."""
    for default in config["defaults"]:
        if isinstance(default, Mapping):
            for key in default:
                yield str(key).rpartition(".")[2]


def _zoo() -> Iterator[Entry]:
    for name in zoo.names():
        card = zoo.card(name)
        accuracy = (card["figures"].get("clean") or {}).get("accuracy")
        clean = "" if accuracy is None else f"clean {100 * accuracy:.1f} %"
        yield Entry(name, str(card["defense"]), clean)


def _show_groups() -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, (_, what) in GROUPS.items():
        table.add_row(Text(f"rbl list {name}", style="bold"), what)
    console().print(table)


def _show(title: str, found: Iterable[Entry]) -> None:
    table = Table(title=title, box=None, pad_edge=False, show_header=False, title_justify="left", title_style="bold")
    for ratio in (None, 3, 2):
        table.add_column(overflow="fold", ratio=ratio, no_wrap=ratio is None)
    for entry in found:
        table.add_row(Text(entry.name, style="cyan"), Text(entry.summary), Text(entry.settings, style="dim"))
    console().print(table)
