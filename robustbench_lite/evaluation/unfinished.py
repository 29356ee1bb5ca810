"""What an evaluation has left open: methods without an answer about some samples, and why. Importing it needs no torch.

Nothing is invented for them: an attack that was cut off has proven nothing, so its samples have no row. They are
computed by the next run that has more time, or more budget, or no error any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustbench_lite.evaluation.report import Report

__all__ = ["BUDGET", "ERROR", "TIME_LIMIT", "EvaluationError", "Unfinished", "joined"]

TIME_LIMIT = "time limit"
BUDGET = "budget"
ERROR = "error"


class EvaluationError(RuntimeError):
    """A method, or the model, failed. What could be evaluated was, and is kept.

    Attributes:
        report: what was evaluated, with the samples that are `unfinished`; None where nothing was.
    """

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Unfinished:
    """A method that has no rows about some samples.

    Attributes:
        threat: the threat's name; None for clean answers.
        eps: its budget.
        kind: "clean", "attack" or "certifier".
        method: the method's name in tables.
        samples: how many it has no row about.
        reason: `TIME_LIMIT`, `BUDGET` or `ERROR`.
        detail: what happened, in words.
        traceback: of the first error.
    """

    threat: str | None
    eps: float | None
    kind: str
    method: str
    samples: int
    reason: str
    detail: str
    traceback: str = field(default="", repr=False)

    @property
    def names(self) -> tuple[str | None, float | None]:
        """Name and budget of the threat."""
        return self.threat, self.eps

    @property
    def words(self) -> str:
        """The reason as a table shows it where a figure would stand: "not run: budget", "open: error"."""
        return f"{'not run' if self.reason == BUDGET else 'open'}: {self.reason}"

    def __str__(self) -> str:
        """Say it in one line."""
        under = f" ({self.threat})" if self.threat else ""
        return f"{self.method}{under}: {self.samples} sample{'s' * (self.samples != 1)} {self.words}; {self.detail}"


def joined(before: Unfinished | None, more: Unfinished) -> Unfinished:
    """Return two parts of one method, of one reason, as one; the first detail is kept."""
    return more if before is None else replace(before, samples=before.samples + more.samples)
