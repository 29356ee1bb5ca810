"""Check that a built wheel holds every module, config and weight of the tree. Usage: check_wheel.py WHEEL."""

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"robustbench_lite": "robustbench_lite"} | {
    name: f"robustbench_lite/{name}" for name in ("attacks", "certify", "conf", "defenses")
}
KEPT = {".py", ".yaml", ".safetensors", ".typed"}

expected = {
    f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
    for folder, target in FOLDERS.items()
    for path in (ROOT / folder).rglob("*")
    if path.suffix in KEPT or path.name == "py.typed"
    if not any(parent.is_symlink() for parent in path.parents)
}
with zipfile.ZipFile(sys.argv[1]) as wheel:
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
missing, extra = sorted(expected - found), sorted(found - expected)
if missing or extra:
    sys.exit(f"the wheel lacks {missing} and has unexpectedly {extra}")
print(f"the wheel holds all {len(expected)} files of the tree")
