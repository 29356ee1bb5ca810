"""`rbl submit`: adversarial examples from outside, judged from scratch, kept where they beat the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from rich.text import Text

from robustbench_lite.app.arguments import as_overrides
from robustbench_lite.app.console import console
from robustbench_lite.app.devices import check_device, require_device
from robustbench_lite.app.hydra_app import run
from robustbench_lite.app.jobs import plain_config
from robustbench_lite.app.screen import show_sheet
from robustbench_lite.report.sheet import sheets

if TYPE_CHECKING:
    from robustbench_lite.evaluation.store import Store
    from robustbench_lite.evaluation.submission import Submission

__all__ = ["job", "main"]

_OPTIONS = ("file", "defense", "data", "threat", "author", "source", "name", "seed", "store", "device")
_SHOWN = 20  # lines of each kind


def main(arguments: Sequence[str]) -> int:
    """Run `rbl submit`."""
    return run(job, "submit", as_overrides(arguments, ["file"], _OPTIONS))


def job(config: DictConfig) -> int:
    """Judge a submission and return the exit status: 1 if none of its inputs is an adversarial example.

    Raises:
        ValueError: no such file, arrays that do not go together, or no defense.
        StoreError: the store holds no evaluation that there is to beat.
    """
    plain = plain_config(config) | {"limit": None}
    check_device(plain["device"])
    from robustbench_lite.evaluation.handed import Handed

    if not plain["defense"] and not (plain["model"] or {}).get("_target_"):
        raise ValueError("say whom the examples fool: --defense <data>/<name>, or model._target_=... model.weights=...")
    handed = Handed.load(Path(plain["file"]), str(plain["author"]), str(plain["source"]))
    require_device(plain["device"])
    from robustbench_lite.app import building
    from robustbench_lite.evaluation.store import Store
    from robustbench_lite.evaluation.submission import submit

    store, (threat,) = Store(plain["store"]), building.threats(plain | {"suite": None})
    options = {name: plain[name] for name in ("seed", "precision", "device")}
    model = building.model(plain)
    options["name"] = building.row_name(plain, model)
    found = submit(model, building.data(plain), threat, handed, store, **options)
    _show(found, store, handed.author)
    return int(found.holding == 0)


def _show(found: Submission, store: Store, author: str) -> None:
    screen = console()
    lines = {
        ("best known", "green"): [entry for entry in found.inputs if entry.new],
        ("holds, no news", "dim"): [entry for entry in found.inputs if entry.holds and not entry.new],
        ("does not hold", "red"): [entry for entry in found.inputs if not entry.holds],
    }
    for (what, style), entries in lines.items():
        for entry in entries[:_SHOWN]:
            far = "" if entry.distance is None else f" (distance {entry.distance:.6g})"
            screen.print(
                Text.assemble((f"{what}: ", style), f"sample {entry.index}{far}: {entry.reason}"), soft_wrap=True
            )
        if len(entries) > _SHOWN:
            screen.print(Text(f"... and {len(entries) - _SHOWN} more", style=style))
    if found.new:
        _show_tables(store, author)
    total = len(found.inputs)
    screen.print(
        f"{found.holding} of {total} are adversarial examples, {found.new} of them best known", highlight=False
    )


def _show_tables(store: Store, author: str) -> None:
    """Show the tables in which the submission has a column."""
    from robustbench_lite.evaluation.scan import scan

    for sheet in sheets([scan(store)]):
        if f"submitted({author})" in sheet.headers:
            show_sheet(sheet)
