"""The plan of an evaluation: which method meets which threat, and the cell that each pair fills."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from robustbench_lite.core.threats import Threat
from robustbench_lite.evaluation.cells import Cell
from robustbench_lite.evaluation.methods import Method, attack_method, certifier_method, clean_method
from robustbench_lite.evaluation.report import NotApplicable
from robustbench_lite.evaluation.specs import canonical, spec, title
from robustbench_lite.evaluation.subject import Subject

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.certify.base import Certifier

__all__ = ["MODES", "Plan", "Task", "with_own"]

MODES = ("full", "cascade")
CLEAN_VERSION = 1  # raise it when clean rows change their meaning


@dataclass(frozen=True, eq=False)
class Task:
    """One cell, and the method that fills it.

    Attributes:
        cell: the identity of its rows.
        run: computes the rows of a batch.
        threat: the position of its threat in the plan; -1 for clean rows.
        stage: its turn in a cascade: 0 for proofs that come before the attacks, 1 for attacks, 2 for other proofs.
    """

    cell: Cell
    run: Method
    threat: int
    stage: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """Threats and methods, checked.

    Attributes:
        threats: each is judged alone.
        attacks: in the order they run.
        certifiers: likewise.
        max_queries: the budget of each attack; None for no limit.
        not_applicable: the pairs that do not fit.
    """

    threats: list[Threat]
    attacks: list[Attack]
    certifiers: list[Certifier]
    max_queries: int | None
    not_applicable: list[NotApplicable]

    @classmethod
    def of(
        cls, threats: list[Threat], attacks: list[Attack], certifiers: list[Certifier], max_queries: int | None
    ) -> Plan:
        """Check threats and methods.

        Raises:
            TypeError: something else than threats, or methods that are no dataclasses.
            ValueError: no threat, one without a budget, different bounds, or the same thing twice.
        """
        _check_threats(threats)
        for what, things in (("threat", threats), ("attack", attacks), ("certifier", certifiers)):
            _check_once(what, things)
        for what, methods in (("attack", attacks), ("certifier", certifiers)):
            _check_titles(what, methods)
        if max_queries is not None and max_queries < 1:
            raise ValueError(f"max_queries must be at least 1, got {max_queries}")
        missing = [
            NotApplicable(threat.name, threat.size, kind, _title(kind, method, max_queries), _unsupported(threat))
            for threat in threats
            for kind, methods in (("attack", attacks), ("certifier", certifiers))
            for method in methods
            if not method.supports(threat)
        ]
        return cls(threats, attacks, certifiers, max_queries, missing)

    @property
    def bounds(self) -> tuple[float, float]:
        """The image bounds, the same for all threats."""
        return self.threats[0].bounds

    @property
    def names(self) -> list[tuple[str, float | None]]:
        """Name and budget of each threat."""
        return [(threat.name, threat.size) for threat in self.threats]

    def tasks(self, subject: Subject, dataset: str, seed: int) -> list[Task]:
        """Return the clean task, then for each threat its attacks and its certifiers."""
        common: dict[str, Any] = {"dataset": dataset, "defense": subject.name, "fingerprint": subject.fingerprint}
        common |= {"seed": seed, "precision": subject.precision}
        nothing: dict[str, Any] = {"threat": None, "eps": None, "threat_spec": None, "method_spec": None}
        clean = Cell(kind="clean", method="clean", version=CLEAN_VERSION, **nothing, **common)
        tasks = [Task(clean, clean_method(subject), -1)]
        for place, threat in enumerate(self.threats):
            own = common | {"threat": threat.name, "eps": threat.size, "threat_spec": spec(threat)}
            for attack in filter(lambda method: method.supports(threat), self.attacks):
                settings = {"max_queries": self.max_queries, "view_samples": subject.view_samples}
                cell = _cell("attack", attack, self.max_queries, settings, own)
                tasks.append(Task(cell, attack_method(subject, attack, threat, self.max_queries), place, 1))
            for certifier in filter(lambda method: method.supports(threat), self.certifiers):
                cell = _cell("certifier", certifier, None, {}, own)
                tasks.append(
                    Task(cell, certifier_method(subject, certifier, threat), place, 0 if certifier.cheap else 2)
                )
        return tasks


def with_own(
    model: Any, threats: list[Threat], attacks: list[Attack], certifiers: list[Certifier]
) -> tuple[list[Attack], list[Certifier]]:
    """Return the methods with those that a defense brings itself behind them; one that is given already comes once."""
    adaptive, own = getattr(model, "adaptive_attacks", None), getattr(model, "certifiers", None)
    more = [attack for threat in threats for attack in adaptive(threat)] if callable(adaptive) else []
    proofs = list(own()) if callable(own) else []
    return _joined(attacks, more), _joined(certifiers, proofs)


def _joined(given: list[Any], more: list[Any]) -> list[Any]:
    known = {canonical(spec(method)) for method in given}
    fresh = {canonical(spec(method)): method for method in more}
    return given + [method for text, method in fresh.items() if text not in known]


def _cell(kind: str, method: Any, max_queries: int | None, settings: dict[str, Any], common: dict[str, Any]) -> Cell:
    kept = {key: value for key, value in settings.items() if value is not None}
    name, version = _title(kind, method, max_queries), method.version
    return Cell(kind=kind, method=name, method_spec=spec(method), version=version, settings=kept, **common)


def _unsupported(threat: Threat) -> str:
    return f"it does not support {threat.name}"


def _title(kind: str, method: Any, max_queries: int | None) -> str:
    return title(method, max_queries=max_queries) if kind == "attack" else title(method)


def _check_threats(threats: list[Threat]) -> None:
    if not threats:
        raise ValueError("give at least one threat, such as Lp('linf', '8/255')")
    for threat in threats:
        if not isinstance(threat, Threat):
            raise TypeError(f"a threat must be an object such as Lp('linf', '8/255'), got {threat!r}")
        if threat.size is None or math.isnan(threat.size):
            raise ValueError(f"a robust accuracy needs one budget for all samples: give {threat.name} a number as eps")
    if len({threat.bounds for threat in threats}) > 1:
        raise ValueError(f"threats must agree on the image bounds, got {[threat.bounds for threat in threats]}")


def _check_titles(what: str, methods: list[Any]) -> None:
    """Refuse two methods that one column of the table would hold."""
    names: dict[str, Any] = {}
    for method in methods:
        if title(method) in names:
            raise ValueError(
                f"two {what}s are both called {title(method)} in the table: let the fields that tell them apart show "
                f"(repr=True), or evaluate {names[title(method)]!r} and {method!r} one after the other"
            )
        names[title(method)] = method


def _check_once(what: str, things: list[Any]) -> None:
    seen: set[str] = set()
    for thing in things:
        text = canonical(spec(thing))
        if text in seen:
            raise ValueError(f"the {what} {title(thing)} comes twice")
        seen.add(text)
