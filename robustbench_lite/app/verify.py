"""`rbl verify`: re-check every stored record, example and table with nothing but the models and the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from rich.text import Text

from robustbench_lite import zoo
from robustbench_lite.app import receipts
from robustbench_lite.app.arguments import as_overrides
from robustbench_lite.app.console import console
from robustbench_lite.app.devices import check_device, require_device
from robustbench_lite.app.hydra_app import run
from robustbench_lite.app.jobs import plain_config
from robustbench_lite.app.screen import show_sheet
from robustbench_lite.app.tables import Objection, check_tables
from robustbench_lite.report.sheet import sheets

if TYPE_CHECKING:
    from robustbench_lite.data import Dataset
    from robustbench_lite.evaluation.verify import Verification

__all__ = ["job", "main"]

_SHOWN = 20  # lines of each kind; a store that holds nothing true would fill the screen


def main(arguments: Sequence[str]) -> int:
    """Run `rbl verify [STORE]`."""
    return run(job, "verify", as_overrides(arguments, ["store"], ["store", "device", "data_dir"]))


def job(config: DictConfig) -> int:
    """Verify a store and return the exit status: 0 if all was checked and holds.

    Models and data are rebuilt as the receipts of the store say, a model without one by its name in the zoo.

    Raises:
        StoreError: there is no such store, or a newer version of this package has written it.
        ValueError: the store holds no records.
    """
    plain = plain_config(config)
    check_device(plain["device"])
    from robustbench_lite.evaluation.store import Store
    from robustbench_lite.evaluation.verify import verify

    store = Store(plain["store"])
    if next(store.heads(), None) is None:
        raise ValueError(f"there are no records in {plain['store']}")
    require_device(plain["device"])
    at_hand = _AtHand(store, receipts.all_of(store.root), plain["data_dir"])
    found = verify(store, at_hand.model, at_hand.data, device=plain["device"])
    tables = list(check_tables(store.root))
    _show(found, at_hand.reasons, tables)
    return int(not found.ok or bool(tables))


class _AtHand:
    """The models and data sets that a store speaks of.

    Attributes:
        reasons: why something could not be rebuilt.
    """

    def __init__(self, store: Any, known: list[receipts.Receipt], data_dir: str | None) -> None:
        self._known, self._data_dir = known, data_dir
        self._names = {part.identity["fingerprint"]: part.defense for part in store.parts()}
        self.reasons: list[str] = []

    def model(self, fingerprint: str) -> Any:
        """Return the model with this fingerprint; None where it cannot be had."""
        from robustbench_lite.app import building

        for receipt in self._known:
            if receipt.model["fingerprint"] == fingerprint:
                return self._try(building.model, receipt.config, receipt.defense)
        name = self._names.get(fingerprint)
        return zoo.load_defense(name) if name in zoo.names() else None

    def data(self, name: str) -> Dataset | None:
        """Return the data set that records call by this name; None where it cannot be had."""
        from robustbench_lite.app import building

        for receipt in self._known:
            if receipt.model["dataset"] == name:
                moved = {"data_dir": self._data_dir} if self._data_dir and "data_dir" in receipt.config["data"] else {}
                whole = receipt.config | {"limit": None, "data": receipt.config["data"] | moved}
                return self._try(building.data, whole, name)  # type: ignore[no-any-return]
        return None

    def _try(self, make: Any, config: dict[str, Any], name: str) -> Any:
        try:
            return make(config)
        except (ImportError, OSError, TypeError, ValueError) as error:
            self.reasons.append(f"{name}: {error}")
            return None


def _show(found: Verification, reasons: list[str], tables: list[Objection]) -> None:
    screen = console()
    for sheet in sheets([found.summary]):
        show_sheet(sheet)
    _list("does not hold", "red", [f"{m.file}, sample {m.index}: {m.reason}" for m in found.mismatches])
    _list("does not hold", "red", [f"{name}: {reason}" for name, reason in tables])
    _list("invalid", "bold red", [f"{v.id}: {v.evidence}" for v in found.violations])
    _list("not checked", "yellow", [*dict.fromkeys(reasons), *found.skipped])
    _list("damaged", "yellow", found.warnings)
    fine = found.ok and not tables
    verdict = Text("all of it holds", style="green") if fine else Text("not all of it holds", style="bold red")
    counts = f"{found.records} records, {found.examples} adversarial examples, {found.clean} clean answers, all tables"
    screen.print(Text(f"checked {counts}: ") + verdict)


def _list(what: str, style: str, lines: list[str]) -> None:
    screen = console()
    for line in lines[:_SHOWN]:
        screen.print(Text.assemble((f"{what}: ", style), line), soft_wrap=True)
    if len(lines) > _SHOWN:
        screen.print(Text(f"... and {len(lines) - _SHOWN} more", style=style))
