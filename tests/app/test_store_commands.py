"""`rbl table`, `diff`, `store compact`, `submit` and what `rbl verify` says of tables, as users type them."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustbench_lite import Lp, load_data, load_defense
from robustbench_lite.app.arguments import as_overrides
from robustbench_lite.attacks import PGD
from robustbench_lite.evaluation import Store

WEAK = ("suite.attacks.pgd=null", "suite.attacks.fgsm=null", "suite.certifiers=null", "limit=40", "threat.eps=0.1")


def files(store: Path, pattern: str = "*.parquet") -> list[Path]:
    return sorted(store.rglob(pattern))


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves its leaderboard for the others."""
    return tmp_path_factory.mktemp("kept") / "results"


@pytest.fixture
def board(rbl, zoo: Path, folder: Path, kept: Path) -> Path:
    """A leaderboard of the small zoo."""
    if not kept.exists():
        status, out, err = rbl("leaderboard", *WEAK)
        assert status == 0, out + err
        shutil.copytree(folder / "results", kept)
    return Path(shutil.copytree(kept, folder / "results", dirs_exist_ok=True))


@pytest.fixture
def adversarial(zoo: Path, folder: Path) -> Path:
    """What a strong attack finds against digits/a; the first input is nonsense."""
    data = load_data("digits").head(40)
    found = PGD(steps=40, loss="margin")(load_defense("digits/a"), data.images, data.labels, Lp("linf", 0.1))
    x = found.x_adv.numpy().copy()
    x[0] += 3
    np.savez(folder / "adversarial.npz", index=data.indices.numpy(), x_adv=x, label=data.labels.numpy())
    return folder / "adversarial.npz"


def test_the_life_of_a_store(rbl, board: Path, adversarial: Path, folder: Path) -> None:
    shutil.copytree(board, folder / "before")
    status, out, err = rbl("verify", "results")
    assert status == 0, out + err
    assert "all tables: all of it holds" in out
    status, out, err = rbl("submit", "adversarial.npz", "--defense", "digits/a", "threat.eps=0.1", "--author", "Doe")
    assert status == 0, out + err
    assert "best known: sample" in out
    assert "leaves the image bounds" in out
    assert "submitted" in out
    status, out, _ = rbl("diff", "before", "results", "--csv", "d.csv", "json=d.json", "markdown=d.md", "latex=d.tex")
    assert status == 0
    assert "changed" in out
    with (folder / "d.csv").open() as stream:
        rows = {row["defense"]: row for row in csv.DictReader(stream)}
    lost = int(float(rows["digits/a"]["lost"]))
    assert lost > 0
    assert rows["digits/b"]["change"] == "same"
    assert json.loads((folder / "d.json").read_text())["rows"][0]["change"]
    assert (folder / "d.md").exists()
    assert (folder / "d.tex").exists()
    before = len(files(board))
    status, out, _ = rbl("store", "compact", "results")
    assert status == 0
    assert "cells" in out
    assert len(files(board)) <= before
    status, out, err = rbl("leaderboard", *WEAK)  # served, with the submission, from the compacted store
    assert status == 0, out + err
    assert err.count("from the store") == 2
    assert "submitted" in out
    status, out, err = rbl("verify", "--store", "results")
    assert status == 0, out + err


def test_a_table_of_all_that_a_store_holds(rbl, board: Path, folder: Path) -> None:
    status, out, err = rbl("table", "results", "--out", "tables", "cards=cards")
    assert status == 0, out + err
    written = {path.suffix: path for path in (folder / "tables").iterdir()}
    assert set(written) == {".csv", ".json", ".md", ".tex"}
    with written[".csv"].open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["defense"] for row in rows} == {"digits/a", "digits/b"}
    cards = sorted((folder / "cards" / "digits" / "Linf").iterdir())
    assert len(cards) == 2
    entry = json.loads(cards[0].read_text())
    (folder / "others.json").write_text(
        json.dumps([entry | {"threat": "Linf", "model": "theirs", "link": "somewhere"}])
    )
    status, out, err = rbl("table", "results", "--published", "others.json")
    assert status == 0, out + err
    assert "theirs" in out
    assert "published" in out
    status, _, err = rbl("table", "nowhere")
    assert status == 2
    assert "no store at nowhere" in err


def test_the_snippets_of_the_pages_run(board: Path, folder: Path) -> None:
    for page in ("store.md", "share-results.md"):
        text = (Path(__file__).parents[2] / "docs" / page).read_text()
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            space: dict[str, Any] = {}
            exec(compile(code, page, "exec"), space)
            if "attacks" in space:
                assert len(space["attacks"]) == 2 * 40
    assert (folder / "adversarial_examples.npz").exists()


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("what", ["figure", "rank", "markdown", "latex", "json", "row"])
def test_a_table_that_was_tampered_with_is_named(what: str, rbl, board: Path) -> None:
    (table,) = (board / "tables").glob("*.csv")
    rows = list(csv.reader(table.read_text().splitlines()))
    if what == "figure":
        column = rows[0].index("worst_case")
        change(table, rows[1][column], "0.999")
    elif what == "rank":
        rows[1][0] = "7"
        table.write_text("".join(",".join(f'"{cell}"' if "," in cell else cell for cell in row) + "\n" for row in rows))
    elif what == "row":
        table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")
    else:
        path = table.with_suffix({"markdown": ".md", "latex": ".tex", "json": ".json"}[what])
        change(path, "digits", "Digits")
    status, out, _ = rbl("verify")
    assert status == 1
    assert "does not hold: tables/" in out
    assert "not all of it holds" in out


def test_records_that_are_gone_are_missed(rbl, board: Path) -> None:
    """Failures of an attack have no example that would miss them: the receipt does."""
    for part in Store(board).parts():
        if part.identity["kind"] == "attack":
            part.path.unlink()
            part.path.with_suffix(".safetensors").unlink(missing_ok=True)
            break
    status, out, _ = rbl("verify")
    assert status == 1
    assert "on digits are no longer all there" in out


def test_a_submission_of_which_nothing_holds(rbl, board: Path, adversarial: Path, folder: Path) -> None:
    with np.load(adversarial) as arrays:
        np.savez(folder / "bad.npz", index=arrays["index"], x_adv=arrays["x_adv"] * 0 + 0.5)
    before = files(board)
    status, out, _ = rbl("submit", "file=bad.npz", "defense=digits/a", "threat.eps=0.1")
    assert status == 1
    assert "0 of 40 are adversarial examples" in out
    assert files(board) == before
    for arguments, message in (
        (("bad.npz",), "say whom the examples fool"),
        (("nowhere.npz", "--defense", "digits/a"), "cannot be read"),
        (("bad.npz", "--defense", "digits/a", "threat.eps=0.3"), "nothing to beat"),
        (("bad.npz", "--defense"), "--defense needs a value"),
        (("bad.npz", "more"), "one argument too many"),
        ((), "give a value: file="),
    ):
        status, _, err = rbl("submit", *arguments)
        assert status == 2, err
        assert message in err


def test_commands_without_what_they_need(rbl, folder: Path) -> None:
    for arguments, message in (
        (("store", "compress"), "unknown action 'compress'"),
        (("store",), "give a value: action="),
        (("store", "compact", "nowhere"), "no store at nowhere"),
        (("diff", "nowhere", "too"), "no store at nowhere"),
        (("diff", "one"), "give a value: after="),
        (("verify", "nowhere"), "no store at nowhere"),
        (("verify", "one", "two"), "one argument too many"),
    ):
        status, _, err = rbl(*arguments)
        assert status == 2, (arguments, err)
        assert message in err, (arguments, err)


@pytest.mark.parametrize("command", ["table", "diff", "store", "submit", "verify"])
def test_every_command_has_its_help(command: str, rbl) -> None:
    status, out, _ = rbl(command, "--help")
    assert status == 0
    assert f"rbl {command}" in out


def test_a_folder_with_a_difficult_name(rbl, board: Path, folder: Path) -> None:
    for name in ("a store, with = signs", "it's ä"):
        shutil.copytree(board, folder / name)
        status, out, err = rbl("table", "--store", name)
        assert status == 0, out + err
        assert len(Store(folder / name).records()) > 0


def test_words_become_overrides() -> None:
    given: list[Any] = [
        (["dir"], ["store='dir'"]),
        (["--store", "dir", "device=cpu"], ["store='dir'", "device=cpu"]),
        (["--store=a=b"], ["store='a=b'"]),
        (["--cfg", "job", "dir"], ["--cfg", "job", "store='dir'"]),
        (["+x=1", "~y", "--multirun"], ["+x=1", "~y", "--multirun"]),
    ]
    for arguments, expected in given:
        assert as_overrides(arguments, ["store"], ["store"]) == expected
    assert as_overrides(["--defense", "digits/a"], [], ["defense"]) == ["defense=digits/a"]
