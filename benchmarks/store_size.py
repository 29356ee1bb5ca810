"""A compacted store of ten million rows: how long its summary and its leaderboard take, and how much memory.

    python benchmarks/store_size.py                     10,000 samples x 1,000 cells, over 50 defenses
    python benchmarks/store_size.py --defenses 2        a small one
    python benchmarks/store_size.py --keep DIR          leave the store there, and use it again

The rows are made up, but go by the schema: attacks of two threats, certificates of two kinds, hashes, and
floats that do not compress. The table is read in a process of its own, whose peak memory is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from robustbench_lite.evaluation.cells import BLOCK, BLOCKS_PER_FILE, Cell
from robustbench_lite.evaluation.files import write_files
from robustbench_lite.evaluation.folders import fresh_path
from robustbench_lite.evaluation.parquet import metadata, write_rows

CELLS = 20  # of one defense: clean, 12 + 4 attacks, 3 certifiers
GROUP = BLOCKS_PER_FILE * BLOCK  # rows of one file, as compaction leaves them
THREATS = {
    name: {"_target_": "robustbench_lite.core.threats.Lp", "norm": name, "eps": eps, "bounds": [0.0, 1.0]}
    for name, eps in (("linf", 0.1), ("l2", 0.5))
}


class Names:
    """The samples of the made-up data set."""

    def __init__(self, count: int) -> None:
        self.indices = np.arange(count)
        self.hashes = [hashlib.sha256(str(i).encode()).hexdigest()[:16] for i in range(count)]
        self.targets = np.random.default_rng(0).integers(0, 10, count)


def cells(number: int) -> Iterator[tuple[Cell, str | None, float]]:
    """Yield the cells of one defense, the kind of certificate, and the share of samples that fall or are proven."""
    print_of = hashlib.sha256(f"defense {number}".encode()).hexdigest()[:16]
    known: dict[str, Any] = {"dataset": "made-up", "defense": f"defense-{number:02d}", "fingerprint": print_of}
    known |= {"version": 1, "seed": 0, "precision": "float32"}
    nothing: dict[str, Any] = {"threat": None, "eps": None, "threat_spec": None, "method_spec": None}
    yield Cell(kind="clean", method="clean", **nothing, **known), None, 0.05
    for threat, attacks in (("linf", 12), ("l2", 4)):
        about = known | {"threat": threat, "eps": THREATS[threat]["eps"], "threat_spec": THREATS[threat]}
        for place in range(attacks):
            spec = {"_target_": "robustbench_lite.attacks.pgd.PGD", "steps": 10 + place}
            method = f"PGD(steps={10 + place}, loss=margin)"
            share = 0.2 + 0.01 * place + 0.005 * number
            yield Cell(kind="attack", method=method, method_spec=spec, **about), None, share
    about = known | {"threat": "linf", "eps": 0.1, "threat_spec": THREATS["linf"]}
    for name, kind in (("IBP", "deterministic"), ("CROWN", "deterministic"), ("RandomizedSmoothing", "probabilistic")):
        spec = {"_target_": f"robustbench_lite.certify.{name}"}
        yield Cell(kind="certifier", method=name, method_spec=spec, **about), kind, 0.3


def measured(cell: Cell, certificate: str | None, share: float, samples: Names, hard: np.ndarray) -> dict[str, Any]:
    """Return made-up results: samples are easy or hard for attacks and proofs alike, so that the two agree."""
    n, rng = len(hard), np.random.default_rng(int(cell.key[:8], 16))
    lead, wrong = rng.normal(2, 1, n), hard < 0.05
    common = {"margin": lead, "seconds": rng.random(n), "forwards": rng.integers(1, 200, n)}
    if cell.kind == "clean":
        return common | {"prediction": np.where(wrong, 9 - samples.targets, samples.targets), "correct": ~wrong}
    if cell.kind == "attack":
        fallen = hard < share * (1 - 0.1 * rng.random(n))
        fallen |= wrong
        distance = np.where(fallen, np.where(wrong, 0.0, rng.random(n) * float(cell.eps or 0)), np.inf)
        return common | {
            "prediction": np.where(fallen, 9 - samples.targets, samples.targets),
            "correct": ~fallen,
            "success": fallen,
            "distance": distance,
            "backwards": rng.integers(1, 200, n),
            "first_success": np.where(fallen, 3, -1),
        }
    proven = hard > 1 - share
    return common | {
        "prediction": samples.targets,
        "correct": ~wrong,
        "certified": proven,
        "status": np.where(proven, "verified", "unknown").tolist(),
        "radius": np.where(proven, 0.1, 0.0),
        "certificate": [certificate] * n,
        "confidence": np.full(n, 1.0 if certificate == "deterministic" else 0.999),
    }


def build(root: Path, defenses: int, count: int) -> int:
    """Write the store as compaction leaves it, and return the number of rows."""
    samples, rows = Names(count), 0
    for number in range(defenses):
        hard = np.random.default_rng(number + 1).random(count)
        for cell, certificate, share in cells(number):
            table = cell.rows(samples, measured(cell, certificate, share, samples, hard))
            folder = root / "cells" / cell.key
            folder.mkdir(parents=True)
            for start in range(0, count, GROUP):
                part = table.slice(start, GROUP).replace_schema_metadata(metadata(cell, "cpu"))
                last = (start + len(part) - 1) // BLOCK
                write_files([(fresh_path(folder, start // BLOCK, last), lambda out, part=part: write_rows(part, out))])
            rows += count
    return rows


def show(root: Path) -> None:
    """Print wall time and peak memory of the summary and of the leaderboard over it: runs in a process of its own."""
    start = time.perf_counter()
    from robustbench_lite.evaluation.scan import scan
    from robustbench_lite.report.sheet import sheets

    imported = time.perf_counter()
    found = scan(root)
    summed = time.perf_counter()
    ranked = list(sheets([found]))
    done, busy = time.perf_counter(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"imports {imported - start:.2f} s")
    print(f"summary {summed - imported:.2f} s: {len(found.table)} rows")
    print(f"leaderboard {done - summed:.2f} s: {len(ranked)} sheets")
    print(f"summary and leaderboard {done - imported:.2f} s, peak memory {peak:.2f} GiB")
    print(f"processor time, imports included, {busy:.2f} s")  # what the wall clock would show on an idle machine
    print(f"imported: {', '.join(name for name in ('torch', 'sklearn') if name in sys.modules) or 'no torch'}")


def main() -> None:
    """Build the store and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defenses", type=int, default=50)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="folder of the store; used as it is where it exists")
    parser.add_argument("--show", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.show:
        return show(options.show)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary) / "store"
        if not (root / "cells").is_dir():
            start = time.perf_counter()
            rows = build(root, options.defenses, options.samples)
            seconds = time.perf_counter() - start
            files = list(root.rglob("*.parquet"))
            size = sum(path.stat().st_size for path in files) / 2**20
            print(f"built {rows:,} rows in {len(files)} files, {size:.0f} MiB, in {seconds:.0f} s")
        subprocess.run([sys.executable, __file__, "--show", str(root)], check=True)
    return None


if __name__ == "__main__":
    main()
