from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from robustbench_lite.core import registry


def test_every_method_has_a_target_that_imports() -> None:
    for group in ("attack", "certifier", "data", "model"):
        for name in registry.groups(group):
            target = registry.target(group, name)
            assert target == "???" or callable(registry.resolve(target)), (group, name)


def test_unknown_groups_and_names() -> None:
    with pytest.raises(ValueError, match="unknown config group 'atack'; did you mean 'attack'"):
        registry.groups("atack")
    with pytest.raises(ValueError, match="unknown attack 'pgdd'; did you mean 'pgd'"):
        registry.load("attack", "pgdd")


def test_reading_the_registry_needs_no_torch() -> None:
    code = (
        "import sys; from robustbench_lite.core import registry; "
        "[registry.load('data', name) for name in registry.groups('data')]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import something_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_not_installed"):  # not "no module needs_more"
        registry.resolve("needs_more.Net")
    with pytest.raises(ImportError, match="expected a dotted path such as"):
        registry.resolve("Net")
    with pytest.raises(ImportError, match="did you mean 'nn'"):
        registry.resolve("torch.nnn.Linear")
    assert registry.resolve("collections.OrderedDict.fromkeys")("ab") == {"a": None, "b": None}
