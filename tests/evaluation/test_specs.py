"""Specs name exactly, rebuild exactly, and build nothing from elsewhere."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from robustbench_lite.attacks import PGD, FoolboxAttack
from robustbench_lite.core.spatial import Deformation, RotationTranslation
from robustbench_lite.core.threats import Lp
from robustbench_lite.evaluation.specs import build, canonical, spec, title


@dataclass(frozen=True)
class Outer:
    inner: Any
    sizes: tuple[int, ...] = (1, 2)
    table: dict[str, float] = field(default_factory=dict)


@pytest.mark.parametrize(
    "thing",
    [
        Lp("linf", "8/255"),
        Lp("l2", 0.1 + 0.2, bounds=(-1.0, 1.0)),
        RotationTranslation(10, 1),
        Deformation(pixels=2),
        PGD(steps=7, loss="margin"),
        FoolboxAttack("DDNAttack", steps=5),
    ],
    ids=repr,
)
def test_what_is_built_from_a_spec_is_equal(thing: Any) -> None:
    text = canonical(spec(thing))
    again = build(json.loads(text))
    assert again == thing
    assert canonical(spec(again)) == text


def test_a_class_from_outside_is_named_but_not_built() -> None:
    thing = Outer(PGD(restarts=3), (4,), {"a": 0.5})
    assert spec(thing)["inner"] == spec(PGD(restarts=3))
    with pytest.raises(ValueError, match="of this package only"):
        build(spec(thing))


def test_two_nets_inside_have_two_titles() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert title(Outer(one)) == title(Outer(one)) != title(Outer(two))
    assert re.fullmatch(r"Outer\(inner=Linear [0-9a-f]{6}\)", title(Outer(one)))


def test_every_field_enters_the_spec() -> None:
    texts = [
        canonical(spec(PGD(steps=s, restarts=r, loss=loss))) for s in (1, 2) for r in (1, 2) for loss in ("ce", "dlr")
    ]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    "target", ["os.system", "robustbench_lite.core.checks.check_images", "robustbench_lite.no.Such"]
)
def test_only_own_dataclasses_are_built(target: str) -> None:
    with pytest.raises(ValueError, match=r"outside|not a dataclass|no class"):
        build({"_target_": target})


def test_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Lp.eps is a Tensor.*one number"):
        spec(Lp("linf", torch.tensor([0.1, 0.2])))


def test_no_dataclass() -> None:
    with pytest.raises(TypeError, match="dataclass"):
        spec(nn.ReLU())


def test_a_model_inside_is_named_by_its_fingerprint() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert spec(Outer(one)) == spec(Outer(one)) != spec(Outer(two))
    with pytest.raises(ValueError, match="fingerprint"):
        build(spec(Outer(one))["inner"])


def test_titles_show_what_is_not_default() -> None:
    assert title(PGD()) == "PGD"
    assert title(PGD(steps=10, loss="margin")) == "PGD(steps=10, loss=margin)"
    assert title(PGD(), max_queries=5) == "PGD(max_queries=5)"
    assert title(Outer(PGD(steps=3))) == "Outer(inner=PGD(steps=3))"
