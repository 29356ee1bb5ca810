"""Tables say what the summary says: ranked, per threat, n/a where nothing applies."""

from __future__ import annotations

import io
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy.stats import binomtest

from robustbench_lite.evaluation.lines import Names, Outcomes, Summary
from robustbench_lite.report import rank, sheets, to_csv, to_latex, to_markdown, to_screen, write_tables

NAN = float("nan")


def outcomes(n: int, worst: float, shift: int = 0) -> Outcomes | None:
    """The first samples stand: of two rows the worse one stands on no sample on which the better does not."""
    if np.isnan(worst):
        return None
    index = np.arange(n) + shift
    standing = np.arange(n) < round(worst * n)
    return Outcomes(Names(index, np.array([f"{i:016x}" for i in index], dtype=object), index % 10), standing)


def summary(defense: str, worst: float, *, certified: float = NAN, eps: float = 0.1, **changes: Any) -> Summary:
    row: dict[str, Any] = {"dataset": "digits", "defense": defense, "fingerprint": "f", "threat": "linf", "eps": eps}
    row |= {"seed": 0, "precision": "float32", "n": 360, "mode": "full"}
    shares = {"clean": 0.98, "FGSM": worst + 0.01, "PGD(steps=40, loss=margin)": worst, "worst_case": worst}
    for name, value in (shares | {"IBP": certified, "certified": certified, "certified_probabilistic": NAN}).items():
        row |= {name: value, f"{name}_low": value - 0.0123, f"{name}_high": value + 0.0123}
    row |= {"gap": worst - certified, "spared": 0.0, "coverage": np.nan, "auc": np.nan}
    row |= {"timeouts": 0, "incomplete": 0, "verdict": "doubtful", "flags": ""}
    table = pd.DataFrame([row | changes])
    return Summary(table, [outcomes(int(table["n"].iloc[0]), worst)])


def together(*parts: Summary) -> Summary:
    table = pd.concat([part.table for part in parts], ignore_index=True)
    return Summary(table, [own for part in parts for own in part.outcomes])


def named(sheet: Any) -> int:
    return int(sheet.headers.index("defense"))


def lines(sheet: Any, width: int | None = None) -> str:
    out = io.StringIO()
    Console(file=out, width=width or 400).print(to_screen(sheet, width))
    return out.getvalue()


def test_rank_is_one_more_than_the_number_of_rows_that_are_significantly_better() -> None:
    values = {"a": 0.5, "b": 0.7, "c": 0.49, "d": 0.9, "e": 0.1, "f": NAN, "g": 0.5}
    rows = together(*(summary(name, value) for name, value in values.items()))
    rows.table.loc[rows.table["defense"] == "d", "verdict"] = "invalid"
    rows.table.loc[rows.table["defense"] == "g", "incomplete"] = 3
    ranked = rank(rows)
    assert list(ranked["defense"]) == ["b", "a", "c", "e", "d", "g", "f"]
    assert list(ranked["rank"][:4]) == [1, 2, 2, 4]  # half a per cent of 360 samples tells nobody apart
    assert ranked["rank"].isna()[4:].all()
    assert ranked["p_above"].isna().tolist() == [True, False, False, False, True, True, True]
    counts = [round(values[name] * 360) for name in "bace"]
    pairs = [binomtest(0, abs(one - two)).pvalue if one != two else 1.0 for one, two in combinations(counts, 2)]
    expected = dict(zip(combinations("bace", 2), adjusted(pairs), strict=True))
    assert list(ranked["p_above"][1:4]) == pytest.approx([expected["b", "a"], expected["a", "c"], expected["c", "e"]])


def adjusted(p: list[float]) -> list[float]:
    """Holm's procedure as written: the smallest level of the whole at which each hypothesis is rejected."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    steps = [min(1.0, (len(p) - place) * p[i]) for place, i in enumerate(order)]
    return [max(steps[: order.index(i) + 1]) for i in range(len(p))]


def test_rows_without_common_samples_share_a_rank() -> None:
    one, two = summary("a", 0.9), summary("b", 0.1)
    assert list(rank(together(one, two))["rank"]) == [1, 2]
    two.outcomes[0] = outcomes(360, 0.1, shift=1000)
    assert list(rank(together(one, two))["rank"]) == [1, 1]


def test_threats_are_never_mixed() -> None:
    found = list(sheets([summary("a", 0.5), summary("b", 0.4, eps=0.2), summary("c", 0.6), summary("d", 0.1, n=90)]))
    assert [sorted(sheet.frame["defense"]) for sheet in found] == [["a", "c"], ["b"], ["d"]]
    assert len({sheet.slug for sheet in found}) == 3


def test_every_budget_has_files_and_a_title_of_its_own(tmp_path: Path) -> None:
    budgets = [8 / 255, 0.03137, 0.0314, 0.031372549, 0.1, 0.1 + 1e-13, 2.0, 12.345678]
    found = list(sheets([summary("a", 0.5, eps=eps) for eps in budgets]))
    assert len({sheet.title for sheet in found}) == len(budgets)
    assert len({path for sheet in found for path in write_tables(sheet, tmp_path)}) == 4 * len(budgets)
    assert [sheet.title.split(",")[1] for sheet in found[:2]] == [" linf eps 8/255", " linf eps 0.03137"]
    assert [float(sheet.frame["eps"].iloc[0]) for sheet in found] == budgets


def test_rows_that_differ_by_the_seed_say_it() -> None:
    (sheet,) = sheets([summary("a", 0.5), summary("a", 0.4, seed=1)])
    assert [row[named(sheet)].text for row in sheet.rows] == ["a (seed 0)", "a (seed 1)"]
    assert list(sheet.frame["defense"]) == ["a", "a"]
    assert "a (seed 1)" in to_markdown(sheet)
    (sheet,) = sheets([summary("a", 0.5), summary("b", 0.4)])
    assert [row[named(sheet)].text for row in sheet.rows] == ["a", "b"]


def test_not_applicable_is_never_zero() -> None:
    (sheet,) = sheets([summary("a", 0.5), summary("b", 0.0, certified=0.0)])
    cells = {row[named(sheet)].text: dict(zip(sheet.headers, row, strict=True)) for row in sheet.rows}
    assert cells["a"]["certified"].text == "n/a"
    assert cells["b"]["certified"].text == "0.0"
    assert cells["a"]["gap"].text == "n/a"


def test_a_method_for_another_threat_has_no_column() -> None:
    nothing = {name + end: NAN for name in ("FGSM", "PGD(steps=40, loss=margin)") for end in ("", "_low", "_high")}
    turned = summary("a", 0.3, threat="rotation", **nothing)
    linf, rotation = sheets([together(summary("a", 0.5), turned)])
    assert "FGSM" in linf.headers
    assert "FGSM" not in rotation.headers
    (nowhere,) = sheets([turned])  # it has a figure in no table: its column says that it was asked
    assert "FGSM" in nowhere.headers


def test_nor_has_one_without_any_figure_that_is_known_to_be_meant_for_another() -> None:
    nothing = {name + end: NAN for name in ("FGSM", "PGD(steps=40, loss=margin)") for end in ("", "_low", "_high")}
    both = together(summary("a", 0.5, **nothing), summary("a", 0.3, threat="rotation", **nothing))
    linf, rotation = sheets([Summary(both.table, both.outcomes, elsewhere={("rotation", 0.1): {"FGSM"}})])
    assert "FGSM" in linf.headers  # proofs left it nothing there
    assert "FGSM" not in rotation.headers
    assert "PGD(steps=40, loss=margin)" in rotation.headers
    for text in (to_csv, to_markdown, to_latex, lines):
        assert "FGSM" in text(linf)
        assert "FGSM" not in text(rotation)


def test_methods_of_some_rows_stand_among_their_kind() -> None:
    own = summary("b", 0.3)
    other = Summary(own.table.rename(columns=lambda name: name.replace("FGSM", "BIM")), own.outcomes)
    (sheet,) = sheets([summary("a", 0.5), other])
    assert sheet.headers[3:8] == ["clean", "FGSM", "PGD(steps=40, loss=margin)", "BIM", "robust"]
    cells = {row[named(sheet)].text: dict(zip(sheet.headers, row, strict=True)) for row in sheet.rows}
    assert cells["a"]["BIM"].text == cells["b"]["FGSM"].text == "n/a"


def test_csv_has_every_digit() -> None:
    rows = [summary("a", 1 / 3), summary("b", 2 / 7, certified=0.1)]
    (sheet,) = sheets(rows)
    back = pd.read_csv(io.StringIO(to_csv(sheet)), keep_default_na=True)
    for name in ("worst_case", "clean_low", "PGD(steps=40, loss=margin)_high", "gap"):
        pd.testing.assert_series_equal(back[name], sheet.frame[name], check_exact=True, check_dtype=False)
    assert list(back["rank"]) == [1, 2]
    assert list(back["p_above"].isna()) == [True, False]


def test_markdown_has_one_cell_a_column() -> None:
    (sheet,) = sheets([summary("a|b_c", 0.5), summary("b", 0.4)])
    table = [line for line in to_markdown(sheet).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(sheet.headers) + 1}
    assert "50.0 [48.8-51.2]" in table[2]


def test_latex_is_escaped() -> None:
    (sheet,) = sheets([summary("a_b & 5% #1 {x} ~^\\$", 0.5), summary("b", 0.4)])
    text = to_latex(sheet)
    body = text.split("\\midrule")[1].split("\\bottomrule")[0].strip().splitlines()
    assert len(body) == 2
    assert all(len(re.findall(r"(?<!\\)&", line)) == len(sheet.headers) - 1 for line in body)
    assert r"a\_b \& 5\% \#1 \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{}\$" in body[0]
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


@pytest.mark.parametrize("width", [None, 110, 80])
def test_the_screen_shows_every_figure(width: int | None) -> None:
    (sheet,) = sheets([summary("digits/a", 0.5), summary("b", 0.123, certified=0.1)])
    text = lines(sheet, width)
    figures = [cell.text for row in sheet.rows for cell in row if re.fullmatch(r"[\d.]+", cell.text)]
    assert all(figure in text for figure in figures)
    assert all(len(line) <= (width or 400) for line in text.splitlines())
    assert ("48.8-51.2" in text) == (width != 80)


def test_files(tmp_path: Any) -> None:
    (sheet,) = sheets([summary("a", 0.5)])
    paths = write_tables(sheet, tmp_path / "tables")
    assert sorted(path.suffix for path in paths) == [".csv", ".json", ".md", ".tex"]
    assert sorted((tmp_path / "tables").iterdir()) == sorted(paths)
