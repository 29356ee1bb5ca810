"""`rbl selftest`: planted masks, each of which must be flagged and must fall."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig
from rich.table import Table

from robustbench_lite.app.console import console
from robustbench_lite.app.hydra_app import run
from robustbench_lite.app.jobs import plain_config

__all__ = ["job", "main"]


def main(arguments: Sequence[str]) -> int:
    """Run `rbl selftest`."""
    return run(job, "selftest", arguments)


def job(config: DictConfig) -> int:
    """Put each mask on the undefended net of the zoo, and return the exit status: 0 if all are flagged and broken."""
    plain = plain_config(config)
    from robustbench_lite.core.threats import Lp
    from robustbench_lite.data import load_data
    from robustbench_lite.evaluation.masks import MASKS
    from robustbench_lite.evaluation.selftest import selftest
    from robustbench_lite.zoo import load_defense

    net, data = load_defense("digits/standard"), load_data("digits").sample(plain["samples"], seed=plain["seed"])
    threat = Lp("linf", plain["eps"])
    title = f"digits/standard behind masks, linf eps {plain['eps']:g}, {len(data)} samples; accuracy in per cent"
    table = Table("mask", "clean", "naive PGD", "adaptive", "", "flags of the naive evaluation", title=title, box=None)
    failed = 0
    for mask in MASKS:
        found = selftest(net, data, threat, mask, seed=plain["seed"])
        failed += not found.passed
        shares = [f"{100 * share:.1f}" for share in (found.clean, found.naive, found.adaptive)]
        table.add_row(mask, *shares, "ok" if found.passed else "FAILED", ", ".join(found.flags) or "none")
    console().print(table)
    return int(failed > 0)
