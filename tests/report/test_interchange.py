"""What is written can be read back: JSON, Markdown, LaTeX, RobustBench's cards, and rows of others beside ours."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from robustbench_lite.evaluation.lines import Names, Outcomes, Summary
from robustbench_lite.report import (
    changes_sheet,
    load_published,
    model_info,
    sheets,
    to_csv,
    to_json,
    to_latex,
    to_markdown,
    write_cards,
)
from robustbench_lite.report.published import FIELDS

NAN = float("nan")


def summary(*defenses: tuple[str, float], threat: str = "linf", eps: float = 8 / 255, **changes: Any) -> Summary:
    """A table of a few defenses; each stands on the first of 360 samples."""
    rows, outcomes = [], []
    index = np.arange(360)
    names = Names(index, np.array([f"{i:016x}" for i in index], dtype=object), index % 10)
    for defense, worst in defenses:
        row: dict[str, Any] = {
            "dataset": "cifar10",
            "defense": defense,
            "fingerprint": "f",
            "threat": threat,
            "eps": eps,
        }
        row |= {"seed": 0, "precision": "float32", "n": 360, "mode": "full"}
        shares = {"clean": 0.98765, "AutoAttack": worst + 0.01, "PGD(steps=40)": worst + 0.02, "worst_case": worst}
        for name, value in (shares | {"IBP": NAN, "certified": NAN, "certified_probabilistic": NAN}).items():
            row |= {name: value, f"{name}_low": value - 0.0123, f"{name}_high": value + 0.0123}
        row |= {"gap": NAN, "spared": 0.0, "timeouts": 0, "incomplete": 0, "verdict": "doubtful", "flags": "a, b"}
        rows.append(row | changes)
        outcomes.append(Outcomes(names, index < round(360 * worst)))
    return Summary(pd.DataFrame(rows), outcomes)


def texts(sheet: Any) -> list[list[str]]:
    """What a sheet says, cell by cell: its text and interval."""
    return [[f"{cell.text} [{cell.interval}]" if cell.interval else cell.text for cell in row] for row in sheet.rows]


def from_markdown(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in (lines[0], *lines[2:])]
    return [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in cells]


def from_latex(text: str) -> list[list[str]]:
    body = text.split("\\toprule\n")[1].split("\\bottomrule")[0].replace("\\midrule\n", "")
    rows = [re.split(r"(?<!\\) & ", line.removesuffix(" \\\\")) for line in body.splitlines()]
    plain = [[re.sub(r" ?\{\\scriptsize (\[[^]]*\])\}", r" \1", cell) for cell in row] for row in rows]
    marks = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textless": "<", "textgreater": ">"}
    for name, mark in marks.items():
        plain = [[cell.replace(f"\\{name}{{}}", f"\0{ord(mark)}\0") for cell in row] for row in plain]
    plain = [[re.sub(r"\\([&%$#_{}])", r"\1", cell) for cell in row] for row in plain]
    return [[re.sub(r"\0(\d+)\0", lambda found: chr(int(found[1])), cell) for cell in row] for row in plain]


DEFENSES = (("a|b_c*", 0.5), ("x & y 5% #1 {z} ~^\\$ <i>", 1 / 3), ("c", 2 / 7))


def test_markdown_and_latex_say_what_the_sheet_says() -> None:
    (sheet,) = sheets([summary(*DEFENSES)])
    for back in (from_markdown(to_markdown(sheet)), from_latex(to_latex(sheet))):
        assert back[0] == sheet.headers
        assert back[1:] == texts(sheet)


def test_csv_and_json_have_every_digit() -> None:
    (sheet,) = sheets([summary(*DEFENSES)])
    from_json = json.loads(to_json(sheet))
    assert from_json["title"] == sheet.title
    from_csv = list(csv.DictReader(io.StringIO(to_csv(sheet))))
    assert len(from_csv) == len(from_json["rows"]) == 3
    for place, row in enumerate(sheet.frame.to_dict("records")):
        for name, value in row.items():
            read, text = from_json["rows"][place][name], from_csv[place][name]
            if pd.isna(value):
                assert (read, text) == (None, "")
            elif isinstance(value, str):
                assert read == text == value
            else:
                assert read == float(text) == value


def published_file(folder: Path, **changes: Any) -> Path:
    entry = {
        "link": "https://example.org/1",
        "name": "A title",
        "authors": "A",
        "dataset": "cifar10",
        "venue": "V 2020",
    }
    entry |= {"eps": "8/255", "clean_acc": "90.10", "reported": "60.0", "autoattack_acc": "55.5", "unreliable": False}
    path = folder / "Linf" / "Someone2020Title.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({key: value for key, value in (entry | changes).items() if value is not ...}))
    return path


def test_rows_of_others_stand_beside_ours_and_say_so(tmp_path: Path) -> None:
    published_file(tmp_path)
    rows = load_published(tmp_path)
    ours = summary(("ours", 0.5), ("better", 0.7))
    linf, l2 = sheets([ours, summary(("ours", 0.5), threat="l2", eps=0.5)], rows)
    assert [row[linf.headers.index("defense")].text for row in linf.rows] == ["better", "ours", "Someone2020Title"]
    last = dict(zip(linf.headers, (cell.text for cell in linf.rows[-1]), strict=True))
    assert (last["rank"], last["clean"], last["robust"], last["verdict"]) == ("-", "90.1", "55.5", "published")
    assert last["source"] == "V 2020, https://example.org/1"
    assert last["AutoAttack"] == last["certified"] == "n/a"
    assert "source" not in l2.headers
    (alone,) = sheets([ours])
    assert list(alone.frame["rank"]) == list(linf.frame["rank"][:2])  # they take part in no comparison
    for text in (to_csv(linf), to_json(linf), to_markdown(linf), to_latex(linf)):
        assert "published" in text


def test_ways_to_give_published_rows(tmp_path: Path) -> None:
    file = published_file(tmp_path)
    (row,) = load_published(file).to_dict("records")
    assert row["eps"] == pytest.approx(8 / 255)
    listed = tmp_path / "rows.json"
    entry = json.loads(file.read_text())
    listed.write_text(json.dumps([entry | {"threat": "Linf", "model": "Someone2020Title"}] * 2))
    assert load_published(listed).to_dict("records") == [row, row]
    table = tmp_path / "rows.csv"
    pd.DataFrame([entry | {"threat": "linf", "model": "Someone2020Title"}]).to_csv(table, index=False)
    assert load_published(table).to_dict("records") == [row]
    published_file(tmp_path, external="54.0")
    assert load_published(file)["worst_case"].tolist() == [0.54]  # the best known counts
    published_file(tmp_path, autoattack_acc=...)
    (row,) = load_published(file).to_dict("records")
    assert row["worst_case"] == 0.6
    assert row["source"].endswith("(as its authors report)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ...}, "has no dataset"),
        ({"eps": None}, "has no eps"),
        ({"eps": "a lot"}, "eps must be a number"),
        ({"clean_acc": "190"}, r"percentage between 0 and 100, got '190'"),
        ({"clean_acc": "high"}, "percentage"),
        ({"autoattack_acc": ..., "reported": ...}, "has no robust accuracy"),
        ({"link": ..., "venue": "N/A"}, "has no source"),
        ({"threat": "corruptions"}, "say the threat"),
    ],
)
def test_published_rows_without_sense(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    published_file(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_published(tmp_path)
    assert "Someone2020Title.json, entry 1" in str(caught.value)


def test_files_that_hold_no_published_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.json files"):
        load_published(tmp_path)
    for text in ("{", '"text"', "[1]"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json"):
            load_published(tmp_path / "a.json")
    with pytest.raises(ValueError, match="cannot be read"):
        load_published(tmp_path / "nowhere.csv")


def test_a_card_has_the_fields_and_comes_back_as_a_published_row(tmp_path: Path) -> None:
    ours = summary(("digits/ours", 0.5), ("other", 0.25))
    (sheet,) = sheets([ours])
    paths = write_cards(sheet, tmp_path, {"other": {"link": "https://example.org", "authors": "A"}})
    assert {path.parent for path in paths} == {tmp_path / "cifar10" / "Linf"}
    for path in paths:
        assert tuple(json.loads(path.read_text())) == FIELDS
    card = json.loads(next(path for path in paths if "other" in path.name).read_text())
    assert (card["clean_acc"], card["autoattack_acc"], card["external"]) == ("98.77", "26.00", "25.00")
    assert (card["eps"], card["link"], card["venue"], card["unreliable"]) == (
        "8/255",
        "https://example.org",
        None,
        False,
    )
    assert "360 samples" in card["footnote"]
    assert "doubtful (a, b)" in card["footnote"]
    (row,) = load_published(next(path for path in paths if "other" in path.name)).to_dict("records")
    assert (row["dataset"], row["threat"]) == ("cifar10", "linf")
    assert (row["clean"], row["worst_case"], row["eps"]) == pytest.approx((0.9877, 0.25, 8 / 255))


def test_a_card_claims_no_auto_attack_that_did_not_run() -> None:
    table = sheets([summary(("ours", 0.5), AutoAttack=NAN, verdict="invalid")])
    row = next(table).frame.to_dict("records")[0]
    card = model_info(row)
    assert card["autoattack_acc"] is None  # in a cascade it has no accuracy of its own
    assert card["unreliable"] is True
    assert card["reported"] is None


def test_changes_are_written_like_tables() -> None:
    row: dict[str, Any] = {"dataset": "d", "defense": "x_y", "threat": "linf", "eps": 0.1, "seed": 0, "precision": "f"}
    row |= {"change": "changed", "common": 40, "lost": 9, "gained": 0, "robust_before": 0.5, "robust_after": 0.275}
    row |= {"p": 0.0039, "significant": True, "rows_removed": 0, "rows_added": 40}
    row |= {f"{name}_{when}": "a" for name in ("verdict", "fingerprint") for when in ("before", "after")}
    row |= {f"{name}_{when}": NAN for name in ("certified", "n") for when in ("before", "after")}
    only = row | {
        "change": "only after",
        "common": NAN,
        "p": NAN,
        "robust_before": NAN,
        "significant": False,
        "lost": NAN,
    }
    sheet = changes_sheet(pd.DataFrame([row, only]), "one", "two")
    assert from_markdown(to_markdown(sheet)) == from_latex(to_latex(sheet)) == [sheet.headers, *texts(sheet)]
    said = dict(zip(sheet.headers, texts(sheet)[0], strict=True))
    assert (said["robust"], said["p"], said["change"]) == ("50.0 -> 27.5", "0.004", "changed, significantly")
    assert texts(sheet)[1][sheet.headers.index("p")] == "n/a"
    assert json.loads(to_json(sheet))["rows"][1]["p"] is None
    assert len(to_csv(sheet).splitlines()) == 3


def test_nothing_here_needs_torch() -> None:
    import subprocess

    code = "import robustbench_lite.report, robustbench_lite.evaluation.changes, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
