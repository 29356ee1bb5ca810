"""`rbl evaluate` and `rbl leaderboard`: one row, many rows, all from the store the second time."""

from __future__ import annotations

import csv
import errno
import os
import pkgutil
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pytest

from robustbench_lite import Lp, evaluate, load_data
from robustbench_lite.app import sweeps
from robustbench_lite.attacks import FGSM
from robustbench_lite.evaluation import selftest
from robustbench_lite.models import load_weights

NET = ("model._target_=users_net.Net", "model.weights=net.safetensors", "limit=20")
SMALL = ("suite.attacks.pgd.steps=3", "suite.attacks.random_noise.draws=2", "limit=20")


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "results" / "tables").iterdir())}


def test_a_net_of_the_users_then_from_the_store(rbl, folder: Path) -> None:
    first = rbl("evaluate", *NET, *SMALL)
    again = rbl("evaluate", *NET, *SMALL)
    assert first[0] == again[0] == 0
    assert first[1].replace("kept in", "served from") == again[1]
    assert {path.name for path in folder.iterdir()} <= {"users_net.py", "net.safetensors", "results", "__pycache__"}


def test_the_figures_are_those_of_evaluate(rbl, folder: Path) -> None:
    chosen = ("suite.attacks.random_noise=null", "suite.attacks.pgd=null", "suite.certifiers.cascade=null")
    status, _, _ = rbl("evaluate", "--multirun", *NET, *chosen, "threat.eps=0.2,40/255", "name=mine")
    assert status == 0
    from users_net import Net

    net = Net().eval()
    load_weights(net, "net.safetensors")
    data = load_data("digits").head(20)
    rows = pd.concat(pd.read_csv(path) for path in sorted((folder / "results" / "tables").glob("*.csv")))
    assert sorted(rows["eps"]) == [40 / 255, 0.2]
    assert 0 < rows["worst_case"].min() < rows["clean"].max()
    for eps, row in zip(rows["eps"], rows.itertuples(), strict=True):
        expected = evaluate(net, data, Lp("linf", eps), [FGSM()], name="x").summary().iloc[0]
        assert row.defense == "mine"
        assert (row.clean, row.FGSM, row.worst_case) == (expected["clean"], expected["FGSM"], expected["worst_case"])


def test_attacks_are_added_and_changed(rbl) -> None:
    _, out, _ = rbl("evaluate", *NET, *SMALL, "+attack@suite.attacks.mine=bim", "suite.attacks.mine.steps=2")
    assert "BIM" in out
    assert "steps=2" in out


def test_configs_of_the_users(rbl, folder: Path) -> None:
    (folder / "conf" / "attack").mkdir(parents=True)
    (folder / "conf" / "attack" / "mine.yaml").write_text("_target_: robustbench_lite.attacks.BIM\nsteps: 4\n")
    mine = (f"hydra.searchpath=[file://{folder}/conf]", "+attack@suite.attacks.mine=mine")
    status, out, _ = rbl("evaluate", *NET, *SMALL, *mine)
    assert status == 0
    assert "BIM" in out


def test_without_a_store(rbl, folder: Path) -> None:
    status, out, _ = rbl("evaluate", *NET, *SMALL, "store=null")
    assert status == 0
    assert "Net" in out
    status, _, err = rbl("evaluate", "--multirun", *NET, *SMALL, "store=null")
    assert status == 2
    assert "needs a store" in err
    assert {path.name for path in folder.iterdir()} <= {"users_net.py", "net.safetensors", "__pycache__"}


BROKEN = """
from torch import nn


class Forward(nn.Module):
    def forward(self, x):
        return self.nothing(x)


class Init(nn.Module):
    def __init__(self):
        super().__init__()
        {}["key"]
"""


def test_errors_in_the_users_code_name_it(rbl, folder: Path) -> None:
    (folder / "users_broken.py").write_text(BROKEN)
    for name, words in (("Init", ("Init.__init__", "KeyError: 'key'")), ("Forward", ("Forward", "AttributeError"))):
        status, _, err = rbl("evaluate", f"model._target_=users_broken.{name}", "limit=5")
        assert status == 2
        assert err.count("\n") == 1
        assert all(word in err for word in words)
        assert "Traceback" in rbl("evaluate", f"model._target_=users_broken.{name}", "limit=5", "--debug")[2]


def test_a_net_with_its_own_weights(rbl, folder: Path) -> None:
    (folder / "users_own.py").write_text("import users_net\n\n\nclass Own(users_net.Net):\n" + OWN)
    own = ("model._target_=users_own.Own", "model.weights=own", "limit=20", *SMALL)
    first, again = rbl("evaluate", *own), rbl("evaluate", *own)
    assert first[0] == again[0] == 0
    assert first[1] == again[1]
    assert "served" not in again[1]  # nothing tells whether its file has changed
    expected = rbl("evaluate", *NET, *SMALL, "name=Own", "store=other")[1]
    assert first[1].splitlines()[:6] == expected.splitlines()[:6]
    status, out, err = rbl("verify")
    assert status == 0, out + err


OWN = """\
    def __init__(self):
        super().__init__()
        from robustbench_lite.models import load_weights

        load_weights(self, "net.safetensors")
"""


def test_precision_is_passed_on_and_keyed(rbl, folder: Path) -> None:
    for precision in ("float64", "float32"):
        status, out, _ = rbl("evaluate", *NET, *SMALL, f"precision={precision}")
        assert status == 0
        assert "kept in" in out
    from robustbench_lite.evaluation.store import Store

    assert set(Store("results").records(["precision"])["precision"]) == {"float32", "float64"}


def test_reasons_stand_below_the_table(rbl, folder: Path) -> None:
    (folder / "users_softmax.py").write_text(SOFTMAX)
    soft = ("model._target_=users_softmax.Soft", "model.weights=net.safetensors", *SMALL)
    for arguments in (("evaluate",), ("evaluate",), ("evaluate", "--multirun")):
        status, out, err = rbl(*arguments, *soft)
        assert status == 0, err
        assert "Cascade(falsifier=PGD(steps=10, loss=margin)): n/a" in out
        assert "erfinv" in out


SOFTMAX = """
import torch
import users_net


class Soft(users_net.Net):
    def forward(self, x):
        return torch.erfinv(0.5 * torch.tanh(super().forward(x)))
"""


@pytest.mark.parametrize(("number", "status"), [(errno.EROFS, 0), (errno.ENOSPC, 1)])
def test_a_store_that_cannot_be_written_any_more(rbl, folder: Path, monkeypatch, number: int, status: int) -> None:
    expected = rbl("evaluate", *NET, *SMALL)[1]
    table = rbl("evaluate", "--multirun", *NET, *SMALL, "seed=0,1")[1].partition("written")[0]
    for receipt in (folder / "results" / "receipts").iterdir():
        receipt.unlink()
    shutil.rmtree(folder / "results" / "tables")
    store = folder / "results"

    def refuse(original: Any, path: Path, data: bytes) -> None:
        if path.absolute().is_relative_to(store):
            raise OSError(number, os.strerror(number))
        original(path, data)

    for name in ("app.receipts.put", "app.sweeps.put", "report.export.write_atomically"):
        name = f"robustbench_lite.{name}"
        monkeypatch.setattr(name, partial(refuse, pkgutil.resolve_name(name)))
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    (folder / "tmp").mkdir()
    ended, out, err = rbl("evaluate", *NET, *SMALL)
    assert ended == status
    assert out.splitlines()[:6] == expected.splitlines()[:6]
    assert "receipt could not be kept" in err
    ended, out, err = rbl("evaluate", "--multirun", *NET, *SMALL, "seed=0,1")
    assert ended == status
    assert out.startswith(table)
    assert "the tables could not be kept" in err
    assert list((folder / "tmp").iterdir()) == []


def test_a_sweep_goes_elsewhere_where_nothing_can_be_written(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    assert sweeps.folder_for(str(tmp_path / "store"), "x") == f"{tmp_path}/store/sweeps/x"
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=OSError(errno.EROFS, "read-only")))
    assert sweeps.folder_for(str(tmp_path / "store"), "x").startswith(str(tmp_path / "tmp"))


@pytest.mark.parametrize("command", ["evaluate", "leaderboard", "train", "verify"])
def test_what_hydra_shows(rbl, folder: Path, zoo: Path, command: str) -> None:
    for arguments in (["--cfg", "job"], ["store=x", "--cfg", "job"], ["--cfg", "job", "store=x"], ["--help"]):
        status, out, err = rbl(command, *arguments)
        assert (status, err) == (0, "")
        assert "store: " in out
        assert ("store: x" in out) == ("store=x" in arguments)
    assert not (folder / "results").exists()
    assert not (folder / "x").exists()


@pytest.mark.parametrize("good", [True, False])
def test_the_selftest_says_what_failed(rbl, monkeypatch: pytest.MonkeyPatch, good: bool) -> None:
    def judged(net: object, data: object, threat: object, mask: str, seed: int) -> selftest.Outcome:
        return selftest.Outcome(mask, 0.9, 0.8, ("randomised",), 0.0 if good or mask != "detached" else 0.5)

    monkeypatch.setattr(selftest, "selftest", judged)
    status, out, _ = rbl("selftest", "samples=5", "eps=0.25")
    assert status == int(not good)
    assert "linf eps 0.25, 5 samples" in out
    assert ("FAILED" in out) == (not good)
    assert out.count("randomised") == 6


def test_a_sweep_of_trainings_leaves_weights_alone(rbl, folder: Path) -> None:
    before = set(folder.iterdir())
    chosen = ("model=mlp", "model.hidden=[4]", "limit=50", "epochs=1", "seed=0,1", "weights=w/${seed}.safetensors")
    status, _, err = rbl("train", "--multirun", *chosen)
    assert status == 0, err
    assert {path.name for path in set(folder.iterdir()) - before} <= {"w", "__pycache__"}


def test_leaderboard(rbl, folder: Path, zoo: Path) -> None:
    status, out, err = rbl("leaderboard", *SMALL)
    assert status == 0, err
    written = tables(folder)
    assert {name.rpartition(".")[2] for name in written} == {"csv", "json", "md", "tex"}
    rows = list(csv.DictReader(next(v for k, v in written.items() if k.endswith("csv")).decode().splitlines()))
    assert {row["defense"] for row in rows} == {"digits/a", "digits/b"}
    assert [float(row["worst_case"]) for row in rows] == sorted((float(r["worst_case"]) for r in rows), reverse=True)
    assert all(float(row["certified"]) <= float(row["worst_case"]) <= float(row["clean"]) for row in rows)
    again = rbl("leaderboard", *SMALL)
    assert (again[0], again[1]) == (0, out)
    assert again[2].count("from the store") == 2
    assert tables(folder) == written
    assert not (folder / "results" / "sweeps").exists()


def test_one_failure_leaves_the_others(rbl, folder: Path, zoo: Path) -> None:
    (zoo / "digits" / "a" / "weights.safetensors").write_bytes(b"broken")
    status, out, err = rbl("leaderboard", *SMALL)
    assert status == 1
    assert "digits/b" in out
    assert "digits/a" not in out
    assert err.index("Traceback") < err.index("failed: defense=digits/a")
    assert "not the file of its card" in err
    kept = list((folder / "results" / "sweeps").glob("*/job-*.json"))
    assert any("Traceback" in path.read_text() for path in kept)


def test_invalid_row_is_status_1(rbl, folder: Path) -> None:
    (folder / "users_liar.py").write_text(LIAR)
    liar = ("+suite.certifiers.liar._target_=users_liar.Liar", "suite.certifiers.cascade=null", "threat.eps=0.5")
    for _ in range(2):
        status, out, _ = rbl("evaluate", *NET, *SMALL, *liar)
        assert status == 1
        assert "invalid" in out


LIAR = """
from dataclasses import dataclass

import torch

from robustbench_lite.certify.base import Certifier
from robustbench_lite.core.models import predict
from robustbench_lite.core.results import Certificate, Status


@dataclass(frozen=True)
class Liar(Certifier):
    kind = "deterministic"

    def supports(self, threat):
        return True

    def __call__(self, model, x, y, threat, *, indices=None, generator=None):
        prediction = predict(model, x)
        status = torch.full_like(y, int(Status.VERIFIED), dtype=torch.int8)
        radius = torch.full(y.shape, float(threat.eps), dtype=torch.float64)
        samples = torch.zeros_like(y)
        return Certificate(status, prediction == y, radius, prediction, "deterministic", 1.0, samples)

    run = __call__
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate", "sede=3"], "did you mean 'seed'"),
        (["evaluate", "suite.attacks.pgd.stps=3"], "did you mean 'steps'"),
        (["evaluate", "defense=digits/c"], "did you mean 'digits/"),
        (["evaluate", "data=digitz"], "did you mean 'digits'"),
        (["evaluate", "attack=pdg"], "did you mean 'pgd'? "),
        (["evaluate", "attack=pdg"], "+attack@suite.attacks.mine=pgd"),
        (["evaluate", "suite=certified", "attack=pdg"], "+attack@suite.attacks.mine=pgd"),
        (["evaluate", "attacks=fgsm"], "+attack@suite.attacks.mine=fgsm"),
        (["evaluate", *NET, "+attack=fgsm"], "+attack@suite.attacks.<name>=<attack>"),
        (["evaluate", *NET, "+certifier=ibp"], "would change nothing"),
        (["evaluate", "data.name.x=3"], "name"),
        (["evaluate", *NET, "device=cud"], "device must be auto, cpu, cuda"),
        (["evaluate", *NET, "device=cuda:77"], "device=cuda:77: PyTorch finds"),
        (["evaluate", *NET, "precision=half"], "precision must be one of auto, float32, float64"),
        (["evaluate", "model._target_=users_net.Net"], "model.weights=own"),
        (["evaluate", "+attack@suite.attacks.mine=pgdd"], "did you mean 'pgd'"),
        (["evaluate"], "defense=<data>/<name>"),
        (["evaluate", "defense=ibp_training"], "objective of 'rbl train'"),
        (["evaluate", "defense=digits/a", *NET], "not both"),
        (["evaluate", *NET, "threat.eps=-1"], "threat: eps must be >= 0"),
        (["evaluate", *NET, "suite.attacks.pgd.steps=0"], "suite.attacks.pgd: steps"),
        (["evaluate", *NET, "mode=ful"], "mode must be one of"),
        (["evaluate", *NET, "seed=x"], "seed must be a whole number"),
        (["evaluate", *NET, "data=mnist"], "mnist"),
        (["evaluate", *NET, "data=npz", "data.path=none.npz"], "threat.eps=..."),
        (["evaluate", *NET, "data=npz", "data.path=none.npz", "threat.eps=0.1"], "none.npz"),
        (["evaluate", "model._target_=users_net.Nett"], "did you mean 'Net'"),
        (["evaluate", *NET, "model.weights=none.safetensors"], "none.safetensors"),
        (["evaluate", *NET, "+model.scal=3"], "scal"),
        (["leaderboard", "data=svhn"], "the zoo has no defenses for data 'svhn'"),
        (["train", "defense=digits/a"], "trained already"),
        (["train", "device=cud"], "device must be auto"),
        (["train", "device=cuda:77"], "device=cuda:77: PyTorch finds"),
        (["verify", "device=cud"], "device must be auto"),
        (["train", "zoo=flat"], "<data>/<name>"),
        (["verify", "store=nowhere"], "no store at nowhere"),
        (["evalaute"], "did you mean 'evaluate'"),
    ],
)
def test_errors_are_one_line(rbl, zoo: Path, arguments: list[str], expected: str) -> None:
    status, _, err = rbl(*arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
