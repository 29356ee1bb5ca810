"""Prints the page of the store: python docs/store.py > docs/store.md."""

from __future__ import annotations

from robustbench_lite.evaluation.cells import BLOCK, BLOCKS_PER_FILE
from robustbench_lite.evaluation.records import COLUMNS, SCHEMA_VERSION

HEAD = f"""# The store

Made by `python docs/store.py > docs/store.md`; the columns from `robustbench_lite/evaluation/records.py`.

A store is a folder. Several processes, on several machines, may write to one; a killed one loses what one
method was at, some 500 samples. Any parquet reader can read it: nothing below needs this package.

| what | where |
|---|---|
| records of one cell | `cells/<cell>/<block>-<unique>.parquet`, of {BLOCK} dataset indices, or some of it |
| examples of its successes | beside them, `.safetensors`: `index`, `x_adv`, of a rotation or flow `parameters` |
| several blocks | `cells/<cell>/<first>_<last>-<unique>.parquet`, `.safetensors`, at most {BLOCKS_PER_FILE} |
| flags that no record shows | `flags/<model>-<data>.json` |
| which samples were evaluated together | `slices/<model>-<data>-<content>.json` |
| under which threats, and where their clean answers are | `slices/<model>-<data>-<content>@<run>.json` |
| witnesses of violations | `violations/<model>-<digest>.json` and `.safetensors` |
| finished jobs, to be served without torch | `receipts/<key>.json` |
| jobs that were left unfinished, and serve none | `receipts/unserved-<digest>.json` |
| what outsiders handed in, and what became of it | `submissions/<model>-<data>-<cell>.json` |
| tables of leaderboards and sweeps | `tables/<data>-<threat>-<eps>-<n>.csv`, `.json`, `.md`, `.tex` |

A **cell** is one method on one model, data set, threat, seed and precision. Its folder is named by 24 hex digits of the
sha256 over its identity, which stands as JSON in the metadata of every file: `schema_version`, `identity` (with the
specs that rebuild threat and method), `defense` (what the model was called), `environment` (versions and device). A row
is named by its cell and by index, image hash and label.

## Columns, version {SCHEMA_VERSION}

A reader refuses files of a version above its own. A new column raises nothing: it is null in older rows. A column that
changes its meaning raises the version.

| column | type | null | what it says |
|---|---|---|---|"""

TAIL = """
| kind | columns that are null |
|---|---|
| clean | threat, eps, success, certified, status, distance, radius, backwards, first_success, certificate, confidence |
| attack | certified, radius, certificate, confidence; status but where a claim was refuted or an example submitted |
| certifier | success, distance, backwards, first_success, suspicion; margin where the certifier gives no bounds |

## Merge small files

    rbl store compact STORE

makes few large files of the many small ones of each cell. Others may read and write meanwhile, and it may be killed at
any moment: the merged file appears whole before the old ones go, what is there twice is read once, and who finds a file
gone reads the folder again. Of several rows about one sample the one that is read stays, with its example. Each merged
file is read back and compared before anything is removed. Rows that were made under other versions or on another device
keep a file of their own. What is damaged is left as it is, and named. A merged file has at most 10,000 rows, and
examples that fit in memory.

A store of 10,000,000 rows in 1,000 cells is summed up one model at a time, by the columns that the table needs:
`python benchmarks/store_size.py`.

## Read it elsewhere

```python
from pathlib import Path

import pyarrow.dataset as ds

files = ds.dataset([str(path) for path in Path("results/cells").glob("*/*.parquet")])
attacks = files.to_table(["defense", "threat", "eps", "method", "index", "success"], ds.field("kind") == "attack")
```

A row that two machines computed at the same time is there twice until the store is compacted. This package reads each
once: where the two differ, as those of a randomised model may, the one that says less for the model, whatever the files
are called (a success before a failure, the nearer of two; not certified before certified, the smaller radius; a wrong
clean answer before a right one). `Store("results").records()` does so, and leaves out rows about images that have
changed since.

## Verify it

    rbl verify STORE

takes nothing on trust but the model and the images, which must have the hashes on record. Every adversarial example is
put to the model again: in the threat, at the distance and with the lead on record, wrong (a randomised model in a share
of 80 fresh draws that a majority would not fall below once in 700,000 times). Every record must agree with its cell and
with itself, every example with a record; clean answers are asked again; the audit of attack against proof is repeated;
every table in `tables/` is made again from the records and compared, that of a sweep that was cut off too. What cannot
be checked (a model that is not at hand) is said, and the exit status is 1. Certificates are held against all examples,
but not computed again; that an attack has failed is not proven by attacking again.
"""


def page() -> str:
    """Return docs/store.md."""
    rows = [
        f"| `{column.name}` | {column.type} | {'never' if column.always else 'at times'} | {column.about} |"
        for column in COLUMNS
    ]
    return "\n".join([HEAD, *rows]) + "\n" + TAIL


if __name__ == "__main__":
    print(page(), end="")
