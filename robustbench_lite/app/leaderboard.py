"""`rbl leaderboard`: a multirun over the zoo's defenses of a data set, which ends in one table."""

from __future__ import annotations

from collections.abc import Sequence

from robustbench_lite.app.evaluate import job
from robustbench_lite.app.hydra_app import run

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Run `rbl leaderboard`."""
    return run(job, "leaderboard", arguments)
