"""What somebody hands in is judged from scratch, and counts in the table where it beats the store."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_fakes import Exact, Linear, Shift, two_blocks

from robustbench_lite.attacks import RotationTranslationGrid
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation import Report, Store, StoreError, evaluate
from robustbench_lite.evaluation.compact import compact
from robustbench_lite.evaluation.fingerprint import fingerprint
from robustbench_lite.evaluation.handed import Handed
from robustbench_lite.evaluation.scan import scan
from robustbench_lite.evaluation.submission import Submission, submit
from robustbench_lite.evaluation.verify import verify

THREAT, DATA = Lp("linf", 0.05), two_blocks(40)
MODELS = {fingerprint(Linear()): Linear()}
WEAK = Shift(0.3)


def run(store: Path, **more: Any) -> Report:
    return evaluate(Linear(), DATA, THREAT, store=store, **({"attacks": [WEAK]} | more))


def strongest(reach: float = 1.0) -> torch.Tensor:
    """The strongest attack on `Linear`, without regard to whether it succeeds."""
    sign = torch.where(DATA.labels == 0, -1.0, 1.0).reshape(-1, 1, 1, 1)
    return THREAT.project(DATA.images + sign * reach * 0.05, DATA.images)


def handed(x: torch.Tensor | None = None, **more: Any) -> Handed:
    x = strongest() if x is None else x
    return Handed(DATA.indices.numpy(), x.numpy(), **({"author": "Doe", "source": "a paper"} | more))


def hand_in(store: Path, what: Handed | None = None, **more: Any) -> Submission:
    return submit(Linear(), DATA, THREAT, what or handed(), store, **more)


def fallen(x: torch.Tensor) -> np.ndarray:
    """Which images (N,) the model gets wrong."""
    return (Linear()(x).argmax(dim=1) != DATA.labels).detach().numpy()


def test_what_beats_the_store_is_recorded_and_shown(tmp_path: Path) -> None:
    before = run(tmp_path).summary().iloc[0]
    found = hand_in(tmp_path)
    clean, after = ~fallen(DATA.images), fallen(strongest())
    assert found.holding == (clean & after).sum()
    stood = clean & after & ~fallen(strongest(0.3))
    assert {e.index for e in found.inputs if e.new} >= set(DATA.indices.numpy()[stood])
    assert stood.sum() > 3
    table = scan(tmp_path).table.iloc[0]
    assert table["worst_case"] == (clean & ~after).mean() < before["worst_case"]
    assert table["submitted(Doe)"] >= table["worst_case"]
    assert table["Shift(reach=0.3)"] == before["Shift(reach=0.3)"]
    assert (table["incomplete"], table["mode"], table["n"]) == (0, "full", 40)
    assert table["flags"] == "submitted_beats_attacks"
    rows = Store(tmp_path).records(method="submitted(Doe)")
    assert (rows["status"] == "submitted").all()
    assert rows["success"].all()
    assert len(rows) == found.new
    checked = verify(tmp_path, MODELS, DATA)
    assert checked.ok, checked.mismatches
    assert checked.examples == int(fallen(strongest(0.3)).sum() + found.new)


def test_later_evaluations_show_it_as_well(tmp_path: Path) -> None:
    run(tmp_path)
    hand_in(tmp_path)
    report = run(tmp_path)
    table = report.summary().iloc[0]
    assert table["worst_case"] == scan(tmp_path).table["worst_case"].iloc[0]
    (flag,) = [flag for flag in report.flags if flag.id == "submitted_beats_attacks"]
    assert (flag.threat, flag.eps) == ("linf", 0.05)
    strong = run(tmp_path, attacks=[WEAK, Shift()])  # an attack that finds them itself: nothing to object to
    assert not [flag for flag in strong.flags if flag.id == "submitted_beats_attacks"]
    few = evaluate(Linear(), DATA.head(5), THREAT, [WEAK], store=tmp_path)
    assert set(few.records["index"]) == set(DATA.head(5).indices.tolist())
    other = evaluate(Linear(), DATA, Lp("linf", 0.1), [WEAK], store=tmp_path)
    assert "submitted(Doe)" not in set(other.records["method"])
    assert run(tmp_path, seed=1).summary()["worst_case"].iloc[0] == run(None, seed=1).summary()["worst_case"].iloc[0]


def test_the_same_again_is_no_news_and_nearer_is(tmp_path: Path) -> None:
    run(tmp_path)
    first = hand_in(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    again = hand_in(tmp_path)
    assert (again.holding, again.new) == (first.holding, 0)
    assert sorted(tmp_path.rglob("*")) == files
    nearer = hand_in(tmp_path, handed(strongest(0.8), author="Roe"))
    assert 0 < nearer.new <= nearer.holding < first.holding
    assert {entry.reason.partition(",")[0] for entry in nearer.inputs if entry.new} == {"nearer than the nearest known"}
    third = hand_in(tmp_path, handed(strongest(0.8), author="Doe"))
    assert third.new == 0  # whoever says it
    assert scan(tmp_path).table["worst_case"].iloc[0] == (~fallen(DATA.images) & ~fallen(strongest())).mean()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x + 0.5, "image bounds"),
        (lambda x: (x - 0.4).clamp(0, 1), "outside the threat"),
        (lambda x: torch.where(torch.arange(4) == 2, torch.nan, x), "not finite"),
        (lambda x: DATA.images, "which is no success"),
    ],
    ids=["bounds", "threat", "nan", "clean"],
)
def test_what_does_not_hold_is_listed_with_the_reason(change: Any, reason: str, tmp_path: Path) -> None:
    run(tmp_path)
    before = sorted(tmp_path.rglob("*.parquet"))
    found = hand_in(tmp_path, handed(change(strongest())))
    right = ~fallen(DATA.images)
    reasons = [entry.reason for entry, counts in zip(found.inputs, right, strict=True) if counts]
    assert all(reason in text for text in reasons), reasons
    assert (found.holding, found.new, found.cell) == (0, 0, None)
    assert sorted(tmp_path.rglob("*.parquet")) == before
    assert scan(tmp_path).table["flags"].iloc[0] == ""


def test_samples_must_be_those_that_were_evaluated(tmp_path: Path) -> None:
    evaluate(Linear(), DATA.head(30), THREAT, [WEAK], store=tmp_path)
    label, index = DATA.labels.numpy().copy(), DATA.indices.numpy().copy()
    label[0], index[1], index[2] = 1 - label[0], 12345, index[3]
    found = hand_in(tmp_path, dataclasses.replace(handed(), index=index, label=label))
    reasons = [entry.reason for entry in found.inputs]
    assert "its label is given as" in reasons[0]
    assert reasons[1] == "the data have no sample 12345"
    assert "comes twice" in reasons[3]
    assert all("has not evaluated this sample" in reason for reason in reasons[30:])
    assert scan(tmp_path).table["n"].tolist() == [30]
    moved = Dataset(DATA.name, DATA.split, DATA.images.flip(0), DATA.labels, DATA.indices, 2)
    found = submit(Linear(), moved, THREAT, handed(), tmp_path)
    assert found.holding == 0
    assert sum("is not the one that was evaluated" in entry.reason for entry in found.inputs) >= 28


def test_there_must_be_something_to_beat(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store"):
        hand_in(tmp_path / "nowhere")
    run(tmp_path)
    with pytest.raises(StoreError, match=r"no evaluation of Linear .* under linf 0.1 with seed 0.*evaluate it first"):
        submit(Linear(), DATA, Lp("linf", 0.1), handed(), tmp_path)
    with pytest.raises(StoreError, match=r"no evaluation of Linear .* on linear with seed 3"):
        hand_in(tmp_path, seed=3)
    with pytest.raises(StoreError, match="no evaluation"):
        submit(Linear(7.0), DATA, THREAT, handed(), tmp_path)
    with pytest.raises(ValueError, match="a number as eps"):
        submit(Linear(), DATA, Lp("linf", None), handed(), tmp_path)


class Noisy(Linear):
    """Errs on some share of its calls, on any input off the data."""

    stochastic = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lead = torch.where(torch.rand(len(x)) < self.share, -1.0, 1.0)
        near = torch.where((x == 0).flatten(1).any(dim=1), lead, 1.0)
        return torch.stack([near, -near], dim=1)


@pytest.mark.parametrize(("share", "holds"), [(0.3, False), (0.8, True)])
def test_one_lucky_draw_of_a_randomised_defense_is_not_enough(share: float, holds: bool, tmp_path: Path) -> None:
    model = Noisy()
    model.share = share
    x = torch.full((30, 1, 4, 4), 0.02)
    data = Dataset("grey", "test", x, torch.zeros(30, dtype=torch.int64), torch.arange(30), 2)
    evaluate(model, data, THREAT, [WEAK], store=tmp_path)
    found = submit(model, data, THREAT, Handed(np.arange(30), np.zeros((30, 1, 4, 4), np.float32)), tmp_path)
    assert found.holding == (30 if holds else 0)


def test_a_proof_that_a_submission_breaks_is_invalid(tmp_path: Path) -> None:
    assert run(tmp_path, attacks=[WEAK], certifiers=[Exact(2.0)]).verdict == "doubtful"
    hand_in(tmp_path)
    assert scan(tmp_path).table["verdict"].tolist() == ["invalid"]
    assert run(tmp_path, certifiers=[Exact(2.0)]).verdict == "invalid"


def test_parametric_threats_are_judged_by_their_parameters(tmp_path: Path) -> None:
    turn = RotationTranslation(30, 2)
    evaluate(Linear(), DATA, turn, [RotationTranslationGrid(angles=1, shifts=1)], store=tmp_path)
    result = RotationTranslationGrid(angles=11, shifts=5)(Linear(), DATA.images, DATA.labels, turn)
    assert result.parameters is not None
    inputs = handed(result.x_adv, parameters=result.parameters.numpy())
    with pytest.raises(ValueError, match="needs array 'parameters'"):
        submit(Linear(), DATA, turn, handed(result.x_adv), tmp_path)
    with pytest.raises(ValueError, match="takes no array 'parameters'"):
        submit(Linear(), DATA, THREAT, inputs, tmp_path)
    found = submit(Linear(), DATA, turn, inputs, tmp_path)
    assert found.new > 0
    assert verify(tmp_path, MODELS, DATA).ok
    wild = dataclasses.replace(inputs, parameters=inputs.parameters * 50 + 1)
    assert submit(Linear(), DATA, turn, wild, tmp_path).holding == 0


def test_the_report_of_a_submission(tmp_path: Path) -> None:
    run(tmp_path)
    found = hand_in(tmp_path)
    (path,) = (tmp_path / "submissions").iterdir()
    content = json.loads(path.read_text())
    assert (content["author"], content["source"], content["cell"]) == ("Doe", "a paper", found.cell)
    assert len(content["inputs"]) == 40
    hand_in(tmp_path)
    assert json.loads(path.read_text()) == content  # handed in again it hides nothing
    compact(tmp_path)
    assert run(tmp_path).summary()["worst_case"].iloc[0] == scan(tmp_path).table["worst_case"].iloc[0]
    path.write_text("half")
    run(tmp_path)  # the table of one evaluation does without it, that of the store has it all the same
    assert "submitted(Doe)" in scan(tmp_path).table


def test_files_that_are_none(tmp_path: Path) -> None:
    path, x = tmp_path / "a.npz", np.zeros((3, 1, 4, 4), np.float32)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"x_adv": x}, "no array 'index'"),
        ({"index": np.arange(3)}, "no array 'x_adv'"),
        ({"index": np.arange(2), "x_adv": x}, "x_adv has 3 entries, index has 2"),
        ({"index": np.arange(3.0), "x_adv": x}, "index must be whole numbers"),
        ({"index": np.arange(3), "x_adv": (255 * x).astype(np.uint8)}, "floating point.*uint8"),
        ({"index": np.arange(3), "x_adv": x, "label": np.zeros(2, int)}, "label has 2"),
        ({"index": np.arange(0), "x_adv": x[:0]}, "no inputs"),
    ]
    for arrays, message in cases:
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            Handed.load(path, "", "")
    for data in (b"no zip", b""):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read as an npz"):
            Handed.load(path, "", "")
    with pytest.raises(ValueError, match="cannot be read"):
        Handed.load(tmp_path / "nowhere.npz", "", "")
    run(tmp_path / "store")
    with pytest.raises(ValueError, match=r"must have shape \(N, 1, 4, 4\)"):
        hand_in(tmp_path / "store", Handed(np.arange(2), np.zeros((2, 1, 5, 5))))
