from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
OUTSIDE = ["attacks", "certify", "conf", "defenses"]


def packages_of_the_tree():
    for top in ["robustbench_lite", *OUTSIDE]:
        for path in (ROOT / top).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT).parts
            if not (top == "robustbench_lite" and len(parts) > 1 and parts[1] in OUTSIDE):  # seen through a symlink
                yield ".".join(parts if top == "robustbench_lite" else ("robustbench_lite", *parts))


def test_the_listed_packages_are_those_of_the_tree():
    """A package that is not listed would be missing from the wheel without a word."""
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages_of_the_tree())


def test_the_folders_outside_are_mapped_and_linked():
    for name in OUTSIDE:
        assert SETUPTOOLS["package-dir"][f"robustbench_lite.{name}"] == name
        link = ROOT / "robustbench_lite" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_bare_name_is_refused(name):
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"write 'import robustbench_lite.{name}'" in done.stderr


def test_the_public_names():
    code = (
        "from robustbench_lite import evaluate, load_defense, load_data, Lp, RotationTranslation, Deformation\n"
        "from robustbench_lite import Untargeted, Targeted\n"
        "from robustbench_lite.attacks import FGSM, BIM, PGD, RandomNoise, FoolboxAttack\n"
        "from robustbench_lite.certify import IBP, bounds\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=True)


def test_importing_the_package_is_cheap():
    code = "import sys, robustbench_lite; assert not {'torch', 'sklearn', 'foolbox'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=True)
