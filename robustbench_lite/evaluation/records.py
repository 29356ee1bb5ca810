"""The record: one row, one sample x one method. This file is the schema of everything that is kept.

Nothing here needs torch: tables are served from the store without it.

Columns that are null, by kind:

- clean: threat, eps, success, certified, status, distance, radius, backwards, first_success, certificate, confidence;
- attack: certified, radius, certificate, confidence; status but where a claim was refuted or an example submitted;
- certifier: success, distance, backwards, first_success, suspicion; margin where the certifier gives no bounds.

`suspicion` is null of a model that rejects nothing, and in rows that are older than the column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa

__all__ = ["COLUMNS", "KINDS", "SCHEMA", "SCHEMA_VERSION", "SUBMITTED", "TIE", "Column", "empty_records", "to_frame"]

SCHEMA_VERSION = 1  # raise it when a column changes its meaning; a reader refuses versions above its own

KINDS = ("clean", "attack", "certifier")

SUBMITTED = "submitted"  # status of an example that somebody handed in: such rows exist for successes alone

TIE = 1e-4
"""A lead, in logits, that float32 cannot tell from none: another batch size may turn it round. A positive one beyond it
at a wrong answer says that not the logits decided, but the model's own `predict`."""

_TEXT, _WHOLE, _REAL, _TRUTH = pa.string(), pa.int64(), pa.float64(), pa.bool_()


@dataclass(frozen=True)
class Column:
    """One column of a record: name, Arrow type, what it says (docs/store.md), and whether every row has it."""

    name: str
    type: pa.DataType
    about: str
    always: bool = False


COLUMNS = (
    Column("dataset", _TEXT, 'name of the data, with its split where that is not "test"', True),
    Column("index", _WHOLE, "the sample's number in the whole data set", True),
    Column("sample_hash", _TEXT, "16 hex digits over shape and float32 bytes of the image", True),
    Column("label", _WHOLE, "the true class", True),
    Column("defense", _TEXT, "what the model is called; the fingerprint decides", True),
    Column("fingerprint", _TEXT, "the model: state, configuration, class sources", True),
    Column("threat", _TEXT, 'the threat\'s name, such as "linf"'),
    Column("eps", _REAL, "its budget as one number"),
    Column("kind", _TEXT, "clean, attack or certifier", True),
    Column("method", _TEXT, 'class and the hyper-parameters that are not defaults, or "clean"', True),
    Column("version", _WHOLE, "the method's own version", True),
    Column("prediction", _WHOLE, "answer on the clean input, on the returned input, or what the certificate is about"),
    Column("correct", _TRUTH, "prediction == label (ABSTAIN = -1 and INVALID = -2 never are)"),
    Column("success", _TRUTH, "the attack reached its goal, in the threat, not rejected"),
    Column("certified", _TRUTH, "proven right at eps, with confidence `confidence`; never for an estimate"),
    Column("status", _TEXT, "certifier: verified, falsified, unknown, abstained, timeout; attack: refuted, submitted"),
    Column("distance", _REAL, "of the example found, in the threat's measure, float64; +inf where none"),
    Column("radius", _REAL, "the largest eps proven about `prediction`, or the estimate; 0 where nothing is"),
    Column("margin", _REAL, "lead of the true class in logits: at the input, or its lower bound over the threat"),
    Column("forwards", _WHOLE, "forward passes spent on this sample (a certifier: random draws)"),
    Column("backwards", _WHOLE, "backward passes spent on this sample"),
    Column("first_success", _WHOLE, "forward passes spent when the sample first fell; -1 where it never did"),
    Column("seconds", _REAL, "wall time of the batch, divided by its samples"),
    Column("seed", _WHOLE, "the seed of the evaluation", True),
    Column("precision", _TEXT, "float32 or float64", True),
    Column("certificate", _TEXT, "deterministic, probabilistic or estimate"),
    Column("confidence", _REAL, "1 for a deterministic certificate, 1 - alpha for a probabilistic one"),
    Column("suspicion", _REAL, "a detector's score of the clean or returned input; larger looks less like data"),
)
"""Every column, in its order."""

SCHEMA = pa.schema([pa.field(column.name, column.type, nullable=not column.always) for column in COLUMNS])

_EMPTY = SCHEMA.empty_table()

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
    return _EMPTY
