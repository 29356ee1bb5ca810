"""`rbl store`: look after a store."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig
from rich.text import Text

from robustbench_lite.app.arguments import as_overrides
from robustbench_lite.app.console import console
from robustbench_lite.app.hydra_app import run
from robustbench_lite.app.jobs import plain_config
from robustbench_lite.core.errors import suggest

__all__ = ["ACTIONS", "job", "main"]

ACTIONS = ("compact",)


def main(arguments: Sequence[str]) -> int:
    """Run `rbl store ACTION [STORE]`."""
    return run(job, "store", as_overrides(arguments, ["action", "store"], ["action", "store"]))


def job(config: DictConfig) -> int:
    """Compact a store, and return the exit status: 1 if something damaged was left as it is.

    Raises:
        ValueError: an unknown action.
        StoreError: there is no such store, or it cannot be written.
    """
    plain = plain_config(config)
    if plain["action"] not in ACTIONS:
        raise ValueError(suggest(str(plain["action"]), ACTIONS, "action"))
    from robustbench_lite.evaluation.compact import compact

    done = compact(plain["store"])
    screen = console()
    for line in done.left:
        screen.print(Text.assemble(("left as it is: ", "yellow"), line), soft_wrap=True)
    screen.print(f"{done.cells} cells: {done.before} files became {done.after}", highlight=False)
    return int(bool(done.left))
