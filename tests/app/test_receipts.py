"""What makes a stored answer valid, and what voids it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

from robustbench_lite import load_data
from robustbench_lite.app import building, digests, hydra_app, jobs

NET = (
    "model._target_=users_net.Net", "model.weights=net.safetensors", "limit=20",
    "suite.attacks.pgd=null", "suite.attacks.random_noise=null",
)  # fmt: skip


def config(*overrides: str) -> dict[str, Any]:
    hydra_app.register()
    with initialize_config_module("robustbench_lite.conf", version_base="1.3"):
        return jobs.plain_config(compose("evaluate", list(overrides)))


@pytest.fixture
def plain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(folder))
    (folder / "w.safetensors").write_bytes(b"weights")
    np.savez(folder / "mnist.npz", x=np.zeros(3))
    return config(*NET, "model.weights=w.safetensors", "data=mnist", f"data.data_dir={folder}")


def test_the_key_covers_what_the_answer_depends_on(plain: dict[str, Any], folder: Path, monkeypatch) -> None:
    keys = {jobs.key_of(plain)}
    assert jobs.key_of(copy.deepcopy(plain)) in keys

    changed = copy.deepcopy(plain)
    changed["suite"]["attacks"]["fgsm"]["loss"] = "margin"
    keys.add(jobs.key_of(changed))
    (folder / "w.safetensors").write_bytes(b"WEIGHTS")
    keys.add(jobs.key_of(plain))
    source = folder / "users_net.py"
    source.write_text(source.read_text() + "\n# changed\n")
    keys.add(jobs.key_of(plain))
    os.utime(folder / "mnist.npz", ns=(1, 1))
    keys.add(jobs.key_of(plain))
    monkeypatch.setattr(jobs, "digest_sources", lambda: "another version of this package")
    keys.add(jobs.key_of(plain))
    monkeypatch.setattr(jobs, "library_versions", lambda: {"torch": "3"})
    keys.add(jobs.key_of(plain))
    assert None not in keys
    assert len(keys) == 7


def test_a_path_from_home_is_read_as_the_loaders_do(plain: dict[str, Any], folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    plain["model"]["weights"], plain["data"]["data_dir"] = "~/w.safetensors", "~"
    keys = [jobs.key_of(plain)]
    (folder / "w.safetensors").write_bytes(b"WEIGHTS")
    keys.append(jobs.key_of(plain))
    os.utime(folder / "mnist.npz", ns=(1, 1))
    keys.append(jobs.key_of(plain))
    assert len(set(keys)) == 3
    assert jobs.key_of(plain | {"name": "~nobody_of_this_name/x" + 400 * "y"}) is not None


@pytest.mark.parametrize("target", ["users_net.Net", "users_package.nets.Net"])
def test_code_beside_a_users_net_counts(plain: dict[str, Any], folder: Path, monkeypatch, target: str) -> None:
    for name in ("users_package", "blocks/deep"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("")
    (folder / "users_package" / "nets.py").write_text((folder / "users_net.py").read_text())
    beside, other = folder / "blocks" / "deep" / "layers.py", folder / "notes.txt"
    beside.write_text("A = 1")
    plain["model"]["_target_"], plain["data"]["data_dir"] = target, None
    before = jobs.key_of(plain)
    other.write_text("no code")
    assert jobs.key_of(plain) == before
    beside.write_text("A = 2")
    assert jobs.key_of(plain) not in (before, None)
    monkeypatch.setattr(digests, "_MANY", 2)
    assert jobs.key_of(plain) is None


def test_an_installed_net_is_its_package_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(digests, "get_path", lambda name: str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("outsiders_nets", "unrelated"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("A = 1")
    found = [digests.digest_module("outsiders_nets.Net")]
    (tmp_path / "unrelated" / "__init__.py").write_text("A = 2")
    found.append(digests.digest_module("outsiders_nets.Net"))
    (tmp_path / "outsiders_nets" / "__init__.py").write_text("A = 2")
    found.append(digests.digest_module("outsiders_nets.Net"))
    assert found[0] == found[1] != found[2]


def test_a_data_file_that_changed_under_one_name(rbl, folder: Path) -> None:
    data = ("data=npz", f"data.path={folder}/images.npz", "threat.eps=0.1")
    whole = load_data("digits").head(20)
    rows = []
    for shift in (0, 1):
        images = (whole.images * 255).round().to(torch.uint8).roll(shift, 3).squeeze(1).numpy()
        np.savez(folder / "images.npz", x_test=images, y_test=whole.labels.numpy())
        building._load.cache_clear()  # as in a process of its own
        status, _, err = rbl("evaluate", "--multirun", *NET, *data)
        assert status == 0, err
        rows.append(rbl("evaluate", *NET, *data)[1])
    assert rows[0] != rows[1]
    assert "served from" in rows[1]


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"batch_size": 7}, {"store": "elsewhere"}])
def test_the_key_leaves_out_what_it_does_not(plain: dict[str, Any], change: dict[str, Any]) -> None:
    assert jobs.key_of(plain | change) == jobs.key_of(plain)


def test_no_key_for_code_that_is_not_found(plain: dict[str, Any]) -> None:
    plain["model"]["_target_"] = "nowhere_at_all.Net"
    assert jobs.key_of(plain) is None


def test_every_source_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is that of the same files listed by the package's own modules."""
    files = {Path(m.__file__).resolve() for n, m in list(sys.modules.items()) if _ours(n) and m.__file__}
    seen: set[Path] = set()
    original = digests.digest_file
    monkeypatch.setattr(digests, "digest_file", lambda path: seen.add(Path(path).resolve()) or original(path))
    digests.digest_sources.__wrapped__()
    assert files <= seen


def _ours(name: str) -> bool:
    return name.partition(".")[0] == "robustbench_lite"


def test_a_missing_file_is_computed_again(rbl, folder: Path) -> None:
    first = rbl("evaluate", *NET)[1]
    victim = sorted((folder / "results" / "cells").glob("*/*.parquet"))[0]
    victim.unlink()
    again = rbl("evaluate", *NET)[1]
    assert again == first
    assert rbl("evaluate", *NET)[1] == first.replace("kept in", "served from")


def test_a_damaged_receipt_or_record_is_no_answer(rbl, folder: Path) -> None:
    first = rbl("evaluate", *NET)[1]
    (receipt,) = (folder / "results" / "receipts").iterdir()
    content = receipt.read_bytes()
    receipt.write_bytes(content[:100])
    assert rbl("evaluate", *NET)[1] == first
    assert json.loads(receipt.read_bytes()) == json.loads(content)
    victim = sorted((folder / "results" / "cells").glob("*/*.parquet"))[0]
    victim.write_bytes(victim.read_bytes()[:200])
    assert first.splitlines()[:6] == rbl("evaluate", *NET)[1].splitlines()[:6]


def test_rows_are_named_as_today(rbl) -> None:
    assert "Net" in rbl("evaluate", *NET)[1]
    assert "mine" in rbl("evaluate", *NET, "name=mine")[1]
    assert "mine" in rbl("evaluate", *NET, "name=mine")[1]
    assert "mine" not in rbl("evaluate", *NET)[1]


IMPORTS = """
import sys
from robustbench_lite.app.main import main

status = main(sys.argv[2:])
heavy = [name for name in sys.argv[1].split(",") if name in sys.modules]
raise SystemExit(f"status {status}, imported {heavy}" if status or heavy else 0)
"""


@pytest.mark.parametrize(
    ("heavy", "arguments"),
    [
        ("torch,foolbox,sklearn,hydra,pandas", ["--help"]),
        ("torch,foolbox,sklearn,hydra,pandas", ["list", "attacks"]),
        ("torch,foolbox,sklearn", ["evaluate", "--multirun", *NET]),
    ],
)
def test_what_is_not_imported(rbl, folder: Path, heavy: str, arguments: list[str]) -> None:
    if arguments[0] == "evaluate":
        digests.digest_sources.cache_clear()  # while developing: a file may have changed since this process began
        assert rbl(*arguments)[0] == 0
    command = [sys.executable, "-c", IMPORTS, heavy, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "n/a" not in done.stdout or arguments[0] != "evaluate"
