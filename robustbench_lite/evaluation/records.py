"""The record: one row, one sample x one method. This file is the schema of everything that is kept.

Nothing here needs torch: tables are served from the store without it.

Columns that are null, by kind:

- clean: threat, eps, success, certified, status, distance, radius, backwards, first_success, certificate, confidence;
- attack: certified, status, radius, certificate, confidence;
- certifier: success, distance, backwards, first_success; margin where the certifier gives no bounds.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import pyarrow as pa

__all__ = ["KINDS", "SCHEMA", "SCHEMA_VERSION", "TIE", "empty_records", "to_frame"]

SCHEMA_VERSION = 1  # raise it when a column changes its meaning; a reader refuses versions above its own

KINDS = ("clean", "attack", "certifier")

TIE = 1e-4
"""A lead, in logits, that float32 cannot tell from none: another batch size may turn it round. A positive one beyond it
at a wrong answer says that not the logits decided, but the model's own `predict`."""

_TEXT, _WHOLE, _REAL, _TRUTH = pa.string(), pa.int64(), pa.float64(), pa.bool_()

SCHEMA = pa.schema(
    [
        pa.field("dataset", _TEXT, nullable=False),  # name of the data, with its split where that is not "test"
        pa.field("index", _WHOLE, nullable=False),  # the sample's number in the whole data set
        pa.field("sample_hash", _TEXT, nullable=False),  # 16 hex digits over shape and float32 bytes of the image
        pa.field("label", _WHOLE, nullable=False),  # the true class
        pa.field("defense", _TEXT, nullable=False),  # what the model is called; the fingerprint decides
        pa.field("fingerprint", _TEXT, nullable=False),  # the model: state, configuration, class sources
        pa.field("threat", _TEXT),  # the threat's name, such as "linf"
        pa.field("eps", _REAL),  # its budget as one number
        pa.field("kind", _TEXT, nullable=False),  # clean | attack | certifier
        pa.field("method", _TEXT, nullable=False),  # class and the hyper-parameters that are not defaults, or "clean"
        pa.field("version", _WHOLE, nullable=False),  # the method's own version
        pa.field("prediction", _WHOLE),  # answer on: clean input | returned input | what the certificate is about
        pa.field("correct", _TRUTH),  # prediction == label (ABSTAIN = -1 and INVALID = -2 never are)
        pa.field("success", _TRUTH),  # the attack reached its goal, in the threat, not rejected
        pa.field("certified", _TRUTH),  # proven right at eps, with confidence `confidence`; never for an estimate
        pa.field("status", _TEXT),  # verified | falsified | unknown | abstained | timeout
        pa.field("distance", _REAL),  # of the example found, in the threat's measure, float64; +inf where none
        pa.field("radius", _REAL),  # the largest eps proven about `prediction`, or the estimate; 0 where nothing is
        pa.field("margin", _REAL),  # lead of the true class in logits: at the input | its lower bound over the threat
        pa.field("forwards", _WHOLE),  # forward passes spent on this sample (a certifier: random draws)
        pa.field("backwards", _WHOLE),  # backward passes spent on this sample
        pa.field("first_success", _WHOLE),  # forward passes spent when the sample first fell; -1 where it never did
        pa.field("seconds", _REAL),  # wall time of the batch, divided by its samples
        pa.field("seed", _WHOLE, nullable=False),  # the seed of the evaluation
        pa.field("precision", _TEXT, nullable=False),  # float32 | float64
        pa.field("certificate", _TEXT),  # deterministic | probabilistic | estimate
        pa.field("confidence", _REAL),  # 1 for a deterministic certificate, 1 - alpha for a probabilistic one
    ]
)

_DTYPES: dict[Any, Any] = {  # the same whether or not a column has nulls, and under every pandas
    _TEXT: pd.StringDtype("pyarrow"),
    _WHOLE: pd.Int64Dtype(),
    _TRUTH: pd.BooleanDtype(),
    _REAL: None,  # float64, NaN where null
}


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Return records as a frame whose dtypes depend on the schema alone."""
    frame: pd.DataFrame = table.to_pandas(types_mapper=_DTYPES.get)
    return frame


def empty_records() -> pa.Table:
    """Return a table of records without rows."""
    return SCHEMA.empty_table()
