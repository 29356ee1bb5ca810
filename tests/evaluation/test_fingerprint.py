"""Whatever changes answers changes the fingerprint; what does not, does not."""

from __future__ import annotations

import contextlib
import importlib
import io
import linecache
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.evaluation.fingerprint import fingerprint


class Mask(nn.Module):
    def __init__(self, net: nn.Module, **more: Any) -> None:
        super().__init__()
        self.net = net
        for key, value in more.items():
            setattr(self, key, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class OtherMask(Mask):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.round())


def net(**changes: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, **changes), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))


def edited(change: Callable[[nn.Sequential], None]) -> nn.Sequential:
    model = net()
    with torch.no_grad():
        change(model)
    return model


def nudge_weight(model: nn.Sequential) -> None:
    model[3].weight[0, 0] += 1e-7


def nudge_buffer(model: nn.Sequential) -> None:
    model[1].running_mean[1] += 1


def change_eps(model: nn.Sequential) -> None:
    model[1].eps = 1e-3


def add_hook(model: nn.Sequential) -> None:
    model.register_forward_hook(lambda module, args, out: out * 2)


def hide_buffer(model: nn.Sequential) -> None:
    model.register_buffer("hidden", torch.ones(1), persistent=False)


def test_each_difference_shows() -> None:
    shared = net()
    models: list[Any] = [net(), net(stride=2), net(padding_mode="reflect"), net().double()]
    models += [edited(change) for change in (nudge_weight, nudge_buffer, change_eps, add_hook, hide_buffer)]
    models += [
        Mask(shared),
        OtherMask(shared),
        nn.Sequential(shared),
        Mask(shared, sigma=0.25),
        Mask(shared, sigma=0.5),
    ]
    models += [
        Mask(shared, levels=[1, 2]),
        Mask(shared, levels=(1, 2)),
        Mask(shared, levels={1, 2}),
        Mask(shared, other=[1, 2]),
    ]
    models += [Mask(shared, f=torch.relu), Mask(shared, f=torch.tanh), Mask(shared, f=partial(torch.mul, 2.0))]
    models += [
        Mask(shared, f=partial(torch.mul, 3.0)),
        Mask(shared, f=lambda x: x + 1),
        Mask(shared, f=lambda x: x + 2),
    ]
    models += [
        Mask(shared, table=torch.ones(2)),
        Mask(shared, table=torch.ones(2).double()),
        Mask(shared, nets=[net()]),
    ]
    models += [Mask(shared, nets=[edited(nudge_weight)])]
    prints = [fingerprint(model) for model in models]
    assert len(set(prints)) == len(models)


def test_what_does_not_matter_does_not_show() -> None:
    model, first = net(), fingerprint(net())
    assert fingerprint(model.eval()) == first
    assert fingerprint(model.requires_grad_(False)) == first
    model.requires_grad_(True)(torch.rand(2, 1, 6, 6)).sum().backward()  # eval mode: no running statistics
    assert fingerprint(model) == first


@pytest.mark.slow
def test_a_compiled_module_is_the_module() -> None:
    assert fingerprint(torch.compile(net())) == fingerprint(net())


def test_a_cycle_ends() -> None:
    model = Mask(net())
    model.friends = [1]
    model.friends.append(model.friends)
    assert fingerprint(model) == fingerprint(model)


def test_callables_need_a_name() -> None:
    model = net()
    with pytest.raises(ValueError, match="needs a name"):
        fingerprint(lambda x: model(x))
    assert fingerprint(lambda x: model(x), "a") != fingerprint(lambda x: model(x), "b")
    with pytest.raises(TypeError, match="callable"):
        fingerprint(3)


def over(weights: Tensor, **more: Any) -> Callable[[Tensor], Tensor]:
    def answer(x: Tensor) -> Tensor:
        return x @ weights if more is not None else later

    if more:
        later = 1  # otherwise the cell stays empty
    return answer


class Affine:
    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weights


def test_callables_are_looked_into() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    for wrap in (
        over,
        lambda w: over(w, a=1),
        Affine,
        lambda w: partial(torch.mul, w),
        lambda w: Affine(w).__call__,
        lambda w: nn.ParameterList([w]).get_parameter,
    ):
        assert fingerprint(wrap(one), "m") == fingerprint(wrap(one.clone()), "m") != fingerprint(wrap(two), "m")


HELPERS = """
import torch
from other import shift
STRENGTH = 2.0
TABLE = {"a": torch.ones(2)}
def unused(x): return x
def soften(x): return shift(x) * STRENGTH
class Inner:
    def go(self, x): return x * 3
"""
OTHER = """
import functools, torch
LEVEL = 5
@functools.cache
def deep(): return 7
@torch.no_grad()
def shift(x): return x + LEVEL + deep()
"""
DEFENSE = """
import helpers, logging, torch
from torch import nn
from robustbench_lite.evaluation.fingerprint import fingerprint
LOG = logging.getLogger("x")
def local(x): return x - 1
class Net(nn.Module):
    def forward(self, x):
        LOG.info("x")
        y = [local(v) for v in helpers.soften(x)] + [helpers.TABLE["a"]]
        return torch.stack(y) if x is None else helpers.Inner().go(y)
print(fingerprint(Net()))
"""


@pytest.mark.parametrize(
    ("file", "old", "new", "differs"),
    [
        ("helpers.py", "2.0", "2.5", True),
        ("helpers.py", "shift(x) *", "shift(x) +", True),
        ("helpers.py", "x * 3", "x * 4", True),
        ("helpers.py", "torch.ones", "torch.zeros", True),
        ("other.py", "5", "6", True),
        ("other.py", "7", "8", True),
        ("other.py", "x + LEVEL", "x - LEVEL", True),
        ("defense.py", "x - 1", "x - 2", True),
        ("helpers.py", "unused(x): return x", "unused(x): return -x", False),
    ],
)
def test_what_the_code_names_counts(tmp_path: Path, file: str, old: str, new: str, differs: bool) -> None:
    def answer() -> str:
        done = []
        before = {*sys.modules}
        sys.path.insert(0, str(tmp_path))
        try:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                importlib.invalidate_caches()
                linecache.clearcache()
                runpy.run_path(str(tmp_path / "defense.py"), run_name="anything")
            done.append(out.getvalue())
        finally:
            sys.path.remove(str(tmp_path))
            for name in {*sys.modules} - before:
                if name in ("helpers", "other"):
                    del sys.modules[name]
        return done[0]

    for name, text in (("helpers.py", HELPERS), ("other.py", OTHER), ("defense.py", DEFENSE)):
        (tmp_path / name).write_text(text)
    first = answer()
    assert answer() == first
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new) + "# longer, so that no cache of bytecode is believed\n")
    assert (answer() != first) == differs


MODULE = """
import torch
from torch import nn
from robustbench_lite.evaluation.fingerprint import fingerprint

class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.names = {"b", "a", "c", "much"}
        self.net = nn.Linear(2, 2)
        self.f = lambda x: x

torch.manual_seed(0)
answer = fingerprint(M())
if __name__ == "__main__":
    print(answer)
"""


def test_every_process_agrees(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(MODULE)
    hidden = runpy.run_path(str(script), run_name="imported")
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    child = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env=env)
    assert child.stdout.strip() == hidden["answer"]


def test_a_class_whose_file_is_edited_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "edited_while_running.py"
    file.write_text("from torch import nn\n\n\nclass Net(nn.Identity):\n    strength = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    net = importlib.import_module("edited_while_running").Net()
    first = fingerprint(net)
    assert fingerprint(net) == first
    file.write_text(file.read_text() + "    colour = 2\n")
    assert fingerprint(net) != first
