"""The audit: attack and proof about one sample may not contradict each other.

A witness is a successful attack, or a clean image that is misclassified (distance 0). A certificate that the true label
holds within a radius is broken by a witness at float64 distance <= radius whose float64 lead of the true class is below
-`TOLERANCE`. Radius and norm decide, not the eps that either was asked about, so attacks at one eps audit
certificates at another. What follows depends on the certificate's kind:

- deterministic: a violation, every time;
- probabilistic: each may fail with probability alpha = 1 - confidence. A violation if as many failures as seen among N
  certificates have probability below 1e-3 under Binomial(N, alpha); a finding otherwise;
- estimate: a finding.

An attack whose claimed success did not stand (status "refuted") is a violation as well. Pure functions of the records:
any reader of a store comes to the same verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import bdtrc

from robustbench_lite.evaluation.records import TIE

__all__ = ["GROUP", "SAMPLE", "Audit", "Contradiction", "audit"]

TOLERANCE = 1e-6  # logits: a smaller lead of the wrong class, in float64, proves nothing
UNLIKELY = 1e-3

SAMPLE = ["index", "sample_hash", "label"]
GROUP = ["dataset", "fingerprint", "threat", "eps", "seed", "precision"]
_MODEL = ["dataset", "fingerprint"]


@dataclass(frozen=True)
class Contradiction:
    """Attack and proof, or an attack's claim and the model's answer, that cannot both be true.

    Attributes:
        id: "broken_certificate", "too_many_failures", "refuted_attack", "expected_failure", "broken_estimate",
        "near_tie" or "other_model". evidence: what was seen, in words. defense: the model's name. groups: the table
        rows concerned, each (dataset, fingerprint, threat, eps, seed, precision). facts: the columns of both rows of
        records, by name. witness: where the example is kept, relative to the store; None where it is not. example:
        the input (C, H, W) that shows it, as an array; None where it was not kept.
    """

    id: str
    evidence: str
    defense: str
    groups: tuple[tuple[Any, ...], ...]
    facts: dict[str, Any] = field(default_factory=dict)
    witness: str | None = None
    example: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Audit:
    """What the audit found: violations make a table row invalid, findings are reported."""

    violations: list[Contradiction]
    findings: list[Contradiction]


def audit(records: pd.DataFrame) -> Audit:
    """Check every certificate in the records against every witness of the same sample, model and norm."""
    violations, findings = _refuted(records), _other_model(records)
    pairs = _pairs(records)
    if len(pairs):
        near, kinds = _near(pairs["margin_w"]), pairs["certificate"]
        violations += [_broken("broken_certificate", row) for row in _rows(pairs[~near & (kinds == "deterministic")])]
        findings += [_broken("near_tie", row) for row in _rows(pairs[near & (kinds == "deterministic")])]
        findings += [_broken("broken_estimate", row) for row in _rows(pairs[~near & (kinds == "estimate")])]
        for excessive, contradiction in _probabilistic(records, pairs[~near & (kinds == "probabilistic")]):
            (violations if excessive else findings).append(contradiction)
    return Audit(violations, findings)


def _true(column: pd.Series[Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return column.to_numpy(dtype=bool, na_value=False)


def _near(margin: pd.Series[Any]) -> pd.Series[Any]:
    return margin.between(-TOLERANCE, TIE)


def _claims(records: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return bool (N,): certificates that claim something about the true label."""
    claims = _true(records["certified"]) | (records["radius"] > 0).to_numpy()
    found: np.ndarray[Any, np.dtype[np.bool_]] = (
        _true(records["kind"] == "certifier") & _true(records["correct"]) & claims
    )
    return found


def _pairs(records: pd.DataFrame) -> pd.DataFrame:
    """Return each certificate with one witness inside its radius, whose columns end in _w.

    A clear witness goes before a near tie, and a near one before a far one.
    """
    on, wanted = [*_MODEL, *SAMPLE], ["threat", "radius", "distance", "margin"]
    kinds = records["kind"].to_numpy()
    right, won = _true(records["correct"]), _true(records["success"])
    against = ((kinds == "attack") & won) | ((kinds == "clean") & ~right)
    index = records["index"].to_numpy()
    claimed = _claims(records) & np.isin(index, index[against])  # few: the rest costs time alone
    if not claimed.any():
        return records.iloc[:0]
    records = records.assign(row=np.arange(len(records)))
    proofs = records.loc[claimed, [*on, "threat", "radius", "row"]]
    attacks, wrong = records[(kinds == "attack") & won], records[(kinds == "clean") & ~right]
    found = []
    for witnesses, keys in ((attacks, [*on, "threat"]), (wrong, on)):  # a wrong clean image lies in every threat
        columns = witnesses[[*keys, "distance", "margin", "row"]].rename(columns={"row": "row_w"})
        found.append(proofs.merge(columns.assign(distance=columns["distance"].fillna(0.0)), on=keys))
    pairs = pd.concat(found)[[*on, *wanted, "row", "row_w"]]
    pairs = pairs[pairs["distance"] <= pairs["radius"]]
    pairs = pairs.assign(near=_near(pairs["margin"])).sort_values(["row", "near", "distance"], kind="stable")
    pairs = pairs.drop_duplicates("row")
    left = records.iloc[pairs["row"].to_numpy()].reset_index(drop=True)
    right_side = records.iloc[pairs["row_w"].to_numpy()].reset_index(drop=True).add_suffix("_w")
    return pd.concat([left, right_side.assign(distance_w=pairs["distance"].to_numpy())], axis=1)


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")] if len(frame) else []


def _group(row: dict[str, Any], suffix: str = "") -> tuple[Any, ...]:
    return tuple(row.get(f"{name}{suffix}", row.get(name)) for name in GROUP)


def _broken(kind: str, row: dict[str, Any]) -> Contradiction:
    groups = [_group(row)] + ([_group(row, "_w")] if row["kind_w"] == "attack" else [])
    evidence = (
        f"{row['dataset']} {row['index']} (label {row['label']}): {row['method']} ({row['certificate']}) holds to "
        f"radius {row['radius']:.9g} in {row['threat']}, yet {row['method_w']} found {row['prediction_w']} at distance "
        f"{row['distance_w']:.9g}, lead {row['margin_w']:.3g}"
    )
    facts = {key: row[key] for key in (*_MODEL, "threat", *SAMPLE)}
    facts |= {f"certifier_{k}": row[k] for k in ("method", "version", "eps", "radius", "certificate", "margin", "seed")}
    facts |= {f"witness_{k}": row[f"{k}_w"] for k in ("kind", "method", "version", "eps", "distance", "prediction")}
    facts |= {"witness_margin": row["margin_w"], "witness_seed": row["seed_w"], "tolerance": TOLERANCE}
    return Contradiction(kind, evidence, str(row["defense"]), tuple(dict.fromkeys(groups)), facts)


def _probabilistic(records: pd.DataFrame, broken: pd.DataFrame) -> list[tuple[bool, Contradiction]]:
    """Count failures by certifier and table row; say of each count whether chance explains it."""
    by = [*GROUP, "method", "version", "confidence"]
    answers: list[tuple[bool, Contradiction]] = []
    if len(broken) == 0:
        return answers
    trials = records[_claims(records)].groupby(by, dropna=False).size()
    key: Any
    for key, rows in broken.groupby(by, dropna=False):
        n, failures, alpha = int(trials[key]), len(rows), 1 - float(key[-1])
        chance = float(bdtrc(failures - 1, n, alpha))
        evidence = (
            f"{failures} of {n} certificates of {rows['method'].iloc[0]} are broken by an attack; at alpha {alpha:.3g} "
            f"as many have probability {chance:.3g}"
        )
        excessive = chance < UNLIKELY
        facts: dict[str, Any] = {"failures": failures, "certificates": n, "alpha": alpha, "probability": chance}
        facts |= {"indices": [int(i) for i in rows["index"]], "certifier_method": rows["method"].iloc[0]}
        name = "too_many_failures" if excessive else "expected_failure"
        groups = (tuple(key[: len(GROUP)]),)
        answers.append((excessive, Contradiction(name, evidence, str(rows["defense"].iloc[0]), groups, facts)))
    return answers


def _refuted(records: pd.DataFrame) -> list[Contradiction]:
    refuted, found = _true(records["status"] == "refuted"), []
    for row in _rows(records[refuted]) if refuted.any() else ():
        evidence = (
            f"{row['dataset']} {row['index']} (label {row['label']}): {row['method']} claims success, "
            f"but its input is not in {row['threat']}, or the model answers {row['prediction']} there "
            f"(lead {row['margin']:.3g})"
        )
        kept = (*_MODEL, "threat", "eps", "method", "version", *SAMPLE, "prediction", "margin")
        facts = {key: row[key] for key in kept}
        found.append(Contradiction("refuted_attack", evidence, str(row["defense"]), (_group(row),), facts))
    return found


def _other_model(records: pd.DataFrame) -> list[Contradiction]:
    """Find deterministic certifiers that verified another answer than the deployed model gives."""
    on, sure = [*_MODEL, "seed", "precision", *SAMPLE], _true(records["certificate"] == "deterministic")
    verified, asked = sure & _true(records["status"] == "verified"), _true(records["kind"] == "clean")
    wrong = ~_true(records["correct"]) & (verified | asked)  # of two answers that differ, one is no label
    index = records["index"].to_numpy()
    few = np.isin(index, index[wrong])
    verified, asked = verified & few, asked & few
    if not verified.any():
        return []
    proofs = records.loc[verified, [*GROUP, *SAMPLE, "defense", "method", "prediction"]]
    clean = records.loc[asked, [*on, "prediction", "margin"]]
    both = proofs.merge(clean, on=on, suffixes=("", "_w"))
    both = both[_true(both["prediction"] != both["prediction_w"]) & (both["margin"].abs() > TIE).to_numpy()]
    found: list[Contradiction] = []
    key: Any
    for key, rows in both.groupby([*GROUP, "method"], dropna=False) if len(both) else ():
        evidence = f"{key[-1]} verified {len(rows)} predictions that are not the deployed model's"
        facts = {"method": key[-1], "indices": [int(i) for i in rows["index"]]}
        groups = (tuple(key[: len(GROUP)]),)
        found.append(Contradiction("other_model", evidence, str(rows["defense"].iloc[0]), groups, facts))
    return found
