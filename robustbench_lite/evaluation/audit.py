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

import pandas as pd
from scipy.special import bdtrc

__all__ = ["GROUP", "SAMPLE", "Audit", "Contradiction", "audit"]

TOLERANCE = 1e-6  # logits: a smaller lead of the wrong class, in float64, proves nothing
TIE = 1e-4  # logits: a positive lead beyond it says that not the logits decided, but the model's own `predict`
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
    near = pairs["margin_w"].between(-TOLERANCE, TIE)
    kinds = pairs["certificate"].fillna("deterministic")
    violations += [_broken("broken_certificate", row) for row in _rows(pairs[~near & (kinds == "deterministic")])]
    findings += [_broken("near_tie", row) for row in _rows(pairs[near & (kinds == "deterministic")])]
    findings += [_broken("broken_estimate", row) for row in _rows(pairs[~near & (kinds == "estimate")])]
    for excessive, contradiction in _probabilistic(records, pairs[~near & (kinds == "probabilistic")]):
        (violations if excessive else findings).append(contradiction)
    return Audit(violations, findings)


def _witnesses(records: pd.DataFrame) -> pd.DataFrame:
    """Return attack successes, and misclassified clean images once for each threat that was certified."""
    attacks = records[(records["kind"] == "attack") & records["success"].fillna(False)]
    wrong = records[(records["kind"] == "clean") & ~records["correct"].fillna(True)]
    threats = records.loc[records["kind"] == "certifier", [*_MODEL, "threat"]].drop_duplicates()
    columns = [c for c in records.columns if c not in ("threat", "eps", "distance")]
    wrong = wrong[columns].merge(threats, on=_MODEL).assign(eps=0.0, distance=0.0)
    return pd.concat([part for part in (attacks, wrong[[*records.columns]]) if len(part)] or [attacks])


def _pairs(records: pd.DataFrame) -> pd.DataFrame:
    """Return each certificate with the nearest witness inside its radius, whose columns end in _w."""
    proofs = records[(records["kind"] == "certifier") & records["correct"].fillna(False)]
    proofs = proofs[proofs["certified"].fillna(False) | (proofs["radius"] > 0)].reset_index(names="proof")
    on = [*_MODEL, "threat", *SAMPLE]
    pairs = proofs.merge(_witnesses(records), on=on, suffixes=("", "_w"))
    pairs = pairs[pairs["distance_w"] <= pairs["radius"]]
    # A clear witness goes before a near tie, and a near one before a far one: one pair for each certificate.
    pairs = pairs.assign(clear=~pairs["margin_w"].between(-TOLERANCE, TIE))
    pairs = pairs.sort_values(["proof", "clear", "distance_w"], ascending=[True, False, True], kind="stable")
    return pairs.drop_duplicates("proof").drop(columns=["proof", "clear"])


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


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
    proofs = records[(records["kind"] == "certifier") & records["correct"].fillna(False)]
    trials = proofs[proofs["certified"].fillna(False) | (proofs["radius"] > 0)].groupby(by, dropna=False).size()
    answers = []
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
    rows = records[(records["kind"] == "attack") & (records["status"] == "refuted").fillna(False)]
    found = []
    for row in _rows(rows):
        evidence = (
            f"{row['dataset']} {row['index']} (label {row['label']}): {row['method']} claims success in {row['threat']}, "
            f"but its input lies outside the threat, or the model answers {row['prediction']} there (lead {row['margin']:.3g})"
        )
        facts = {
            key: row[key] for key in (*_MODEL, "threat", "eps", "method", "version", *SAMPLE, "prediction", "margin")
        }
        found.append(Contradiction("refuted_attack", evidence, str(row["defense"]), (_group(row),), facts))
    return found


def _other_model(records: pd.DataFrame) -> list[Contradiction]:
    """Find deterministic certifiers that verified another answer than the deployed model gives."""
    proofs = records[
        (records["status"] == "verified").fillna(False) & (records["certificate"] == "deterministic").fillna(False)
    ]
    clean = records[records["kind"] == "clean"]
    on = [*_MODEL, "seed", "precision", *SAMPLE]
    both = proofs.merge(clean[[*on, "prediction", "margin"]], on=on, suffixes=("", "_w"))
    both = both[(both["prediction"] != both["prediction_w"]) & (both["margin_w"].abs() > TIE)]
    found = []
    for key, rows in both.groupby([*GROUP, "method"], dropna=False):
        evidence = f"{key[-1]} verified {len(rows)} predictions that are not the deployed model's"
        facts = {"method": key[-1], "indices": [int(i) for i in rows["index"]]}
        groups = (tuple(key[: len(GROUP)]),)
        found.append(Contradiction("other_model", evidence, str(rows["defense"].iloc[0]), groups, facts))
    return found
