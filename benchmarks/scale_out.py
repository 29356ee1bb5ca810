"""One sweep by several launchers: the same rows, none twice, and the wall time of each.

Four defenses of the zoo (one of them randomised), five methods and the clean answers, each defense in four shards: in
one process, by the basic launcher, joblib (two workers), a local Ray (two workers) and submitit on this machine. All
columns of all rows must be those of one process, `seconds` aside, and so must the tables. A launcher that is not
installed is left out (extras joblib, ray, slurm).

    python benchmarks/scale_out.py
    python benchmarks/scale_out.py --cluster    # two Ray nodes on loopback, one of them killed while it works
    python benchmarks/scale_out.py --cores      # one core and two, one process and four
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from robustbench_lite.evaluation.store import Store

DEFENSES = "defense=digits/standard,digits/ibp,digits/pgd_at,digits/input_noise"
METHODS = [
    "suite.attacks.random_noise.draws=5",
    "suite.attacks.pgd.steps=5",
    "+attack@suite.attacks.square=square",
    "suite.attacks.square.queries=20",
    "+attack@suite.attacks.bim=bim",
    "suite.certifiers.cascade=null",
]
SETTINGS = ["adaptive=false", "batch_size=13"]  # 16 batches of 200 digits
SHARDS = ["shards=4"]
LAUNCHERS = {
    "one process": [],
    "basic": SHARDS,
    "joblib": [*SHARDS, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "ray": [*SHARDS, "hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"],
    "submitit_local": [*SHARDS, "hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=1"],
}
FILES = 20  # of some 200, when the node is killed
PLUGINS = {"joblib": "joblib", "ray": "ray", "submitit_local": "submitit"}
RBL = [sys.executable, "-c", "import sys; from robustbench_lite.app.main import main; sys.exit(main(sys.argv[1:]))"]


def main() -> int:
    """Print the figures; the status is 1 if two stores differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--cluster", action="store_true", help="kill one node of two")
    parser.add_argument("--cores", action="store_true", help="threads and processes")
    parser.add_argument("--keep", type=Path, help="a folder for the stores and logs")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="rbl-scale-out-"))
    folder.mkdir(parents=True, exist_ok=True)
    run = killed_node if options.cluster else cores if options.cores else launchers
    try:
        good = run(folder, options.images)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if good else 1


def command(store: Path, images: int, more: list[str]) -> list[str]:
    """The sweep as a command."""
    return [*RBL, "evaluate", "--multirun", DEFENSES, *METHODS, *SETTINGS, f"limit={images}", f"store={store}", *more]


def sweep(store: Path, images: int, more: list[str], **environment: str) -> float:
    """Run the sweep into a store, and return its wall time; what it prints goes into a file beside the store."""
    start = time.perf_counter()
    with store.with_suffix(".log").open("w") as log:
        done = subprocess.run(
            command(store, images, more), stdout=log, stderr=log, env=os.environ | environment, check=False
        )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(more)} ended with status {done.returncode}:\n{store.with_suffix('.log').read_text()}"
        )
    return time.perf_counter() - start


def rows(store: Path) -> pd.DataFrame:
    """All records of a store but their seconds, in one order."""
    names = ["fingerprint", "kind", "method", "threat", "eps", "index"]
    return Store(store).records().drop(columns="seconds").sort_values(names, ignore_index=True)


def written(store: Path) -> int:
    """Rows on the disk, each as often as it was written."""
    return sum(len(pd.read_parquet(path, columns=["index"])) for path in store.glob("cells/*/*.parquet"))


def tables(store: Path) -> list[bytes]:
    """The tables that a sweep wrote."""
    return [path.read_bytes() for path in sorted((store / "tables").iterdir())]


def judged(store: Path, expected: Path) -> tuple[bool, str]:
    """Compare two stores, and say in words how they compare."""
    mine, theirs = rows(store), rows(expected)
    equal, once = mine.equals(theirs), written(store) == len(mine)
    same = tables(store) == tables(expected)
    words = f"{len(mine)} rows, {'equal' if equal else 'NOT EQUAL'}, {'none twice' if once else 'SOME TWICE'}"
    return equal and once and same, f"{words}, {'equal tables' if same else 'OTHER TABLES'}"


def launchers(folder: Path, images: int) -> bool:
    """The same sweep by each launcher."""
    good, first = True, folder / "one_process"
    print(f"4 defenses x 5 methods and clean answers, {images} images, 4 shards; {os.cpu_count()} cores, ", end="")
    print(f"load {os.getloadavg()[0]:.1f} before")
    for name, more in LAUNCHERS.items():
        plugin = PLUGINS.get(name)
        if plugin and not (find_spec("hydra_plugins") and find_spec(f"hydra_plugins.hydra_{plugin}_launcher")):
            print(f"{name:15} not installed")
            continue
        store = folder / name.replace(" ", "_")
        seconds = sweep(store, images, more)
        fine, words = judged(store, first)
        good &= fine
        print(f"{name:15} {seconds:6.1f} s  {words}", flush=True)
    return good


def cores(folder: Path, images: int) -> bool:
    """One seed on one core and two, in one process and four: tables, and rows to the last digit."""
    good, first = True, folder / "threads1_processes1"
    four = [*SHARDS, "hydra/launcher=joblib", "hydra.launcher.n_jobs=4"]
    for threads in ("1", "2"):
        for processes, more in ((1, []), (4, four)):
            store = folder / f"threads{threads}_processes{processes}"
            seconds = sweep(store, images, more, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
            fine, words = judged(store, first)
            good &= tables(store) == tables(first) and (fine or threads != "1")
            print(f"{threads} threads, {processes} processes: {seconds:6.1f} s  {words}", flush=True)
    return good


def killed_node(folder: Path, images: int) -> bool:
    """Two Ray nodes on loopback; the second is killed, with the job it runs, once cells are there."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # on a busy machine a node takes minutes
    from ray.cluster_utils import Cluster

    expected, store = folder / "one_process", folder / "cluster"
    sweep(expected, images, [])
    cluster, start = Cluster(initialize_head=True, head_node_args={"num_cpus": 1}), time.perf_counter()
    try:
        node = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        address = f"hydra.launcher.ray.init.address={cluster.address}"
        with store.with_suffix(".log").open("w") as log:
            arguments = command(store, images, [*SHARDS, "hydra/launcher=ray", address])
            running = subprocess.Popen(arguments, stdout=log, stderr=log)
        while running.poll() is None and not (files(store) >= FILES and jobs_under(raylet(node))):
            time.sleep(0.05)
        before, jobs = files(store), jobs_under(raylet(node))
        cluster.remove_node(node, allow_graceful=False)
        status = running.wait()
    finally:
        cluster.shutdown()
    good, words = judged(store, expected)
    print(f"node killed when {before} files of cells were there, with {jobs} job(s) under way on it")
    print(f"status {status} after {time.perf_counter() - start:.1f} s: {words}")
    return good and status == 0 and jobs > 0


def files(store: Path) -> int:
    """How many files of records there are."""
    return len(list(store.glob("cells/*/*.parquet")))


def raylet(node: Any) -> int:
    """The process of a Ray node under which its workers run."""
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET

    return int(node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid)


def jobs_under(pid: int) -> int:
    """How many jobs the workers of a Ray node run: each names itself after its task while it works."""
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "args="], capture_output=True, text=True, check=False)
    return sum("_run_job" in line for line in found.stdout.splitlines())


if __name__ == "__main__":
    sys.exit(main())
