"""`rbl evaluate ... forecast=true`: what the run would cost. Nothing else runs, and nothing is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig
from rich import box
from rich.table import Table

from robustbench_lite.app.console import console
from robustbench_lite.app.devices import require_device
from robustbench_lite.app.jobs import checked_config, served

if TYPE_CHECKING:
    from robustbench_lite.evaluation.forecast import Expected, Forecast

__all__ = ["forecast_job"]

_COLUMNS = ("threat", "method", "in the store", "to compute", "forwards", "backwards", "minutes", "peak MiB")
_SETTINGS = ("seed", "mode", "audit", "adaptive", "batch_size", "device", "max_queries", "precision")


def forecast_job(config: DictConfig) -> int:
    """Print the forecast of a job, and return the exit status.

    Raises:
        ValueError: it is about a shard.
        Exception: what the evaluation would raise about its arguments, or a method in the calibration.
    """
    plain = checked_config(config)
    if plain["shards"] != 1 or plain["shard"] is not None:
        raise ValueError("a forecast is about the whole run: leave shards and shard out")
    if served(plain) is not None:
        console().print(f"forecast: nothing to compute, {plain['store']} answers")
        return 0
    require_device(plain["device"])
    from robustbench_lite.app import building  # torch, from here on
    from robustbench_lite.evaluation.forecast import forecast

    model = building.model(plain)
    name = building.row_name(plain, model)
    found = forecast(
        model,
        building.data(plain),
        building.threats(plain),
        building.methods(plain, "attacks"),
        building.methods(plain, "certifiers"),
        store=plain["store"] or None,
        name=name,
        **{setting: plain[setting] for setting in _SETTINGS},
    )
    console().print(_table(name, found))
    if plain["probed"]:
        console().print("the probe (probed=true) comes on top", style="dim")
    return 0


def _table(name: str, found: Forecast) -> Table:
    title = f"forecast: {name}, {found.samples} samples, {found.device}; calibrated in {found.seconds:.1f} s"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("threat", "method") else "right")
    for cell in [*found.cells, found.total]:
        table.add_row(*_row(cell), style="bold" if cell.method == "total" else "")
    return table


def _row(cell: Expected) -> list[str]:
    threat = "" if cell.threat is None else f"{cell.threat} {cell.eps:g}" if cell.eps is not None else cell.threat
    if not cell.applies:
        return [threat, cell.method, *["n/a"] * (len(_COLUMNS) - 2)]
    numbers = [cell.stored, cell.missing, cell.forwards, cell.backwards]
    peak = "" if cell.peak is None else f"{cell.peak / 2**20:.0f}"
    return [threat, cell.method, *(f"{number:,}" for number in numbers), f"{cell.minutes:.2f}", peak]
