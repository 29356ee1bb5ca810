"""What the documentation shows must work."""

from __future__ import annotations

import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch

from robustbench_lite.core.models import predict
from robustbench_lite.core.threats import Lp
from robustbench_lite.zoo.cards import card

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_attack_of_the_walkthrough_attacks(net, images):
    (code,) = blocks("docs/add-an-attack.md", "python")
    module = types.ModuleType("two_sided_fgsm")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(code, "docs/add-an-attack.md", "exec"), module.__dict__)
    result = module.TwoSidedFGSM()(net, images, predict(net, images), Lp("linf", 0.2), max_queries=4)
    assert result.success.any()
    assert result.forwards.max() <= 4
    assert torch.equal(predict(net, result.x_adv) != predict(net, images), result.success)


@pytest.mark.parametrize("page", ["README.md", "docs/evaluate-my-model.md", "docs/certify.md", "docs/defenses.md"])
def test_the_snippets_run(page, capsys):
    found = blocks(page, "python")
    assert found
    for number, code in enumerate(found):
        exec(compile(code, f"{page}, snippet {number}", "exec"), {"__name__": "snippet"})


def test_the_mnist_table_of_the_readme_holds_what_the_cards_hold():
    lines = re.findall(
        r"^\| `(mnist/\S+)` \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert lines
    for name, *cells in lines:
        figures = card(name)["figures"]
        keys = ("clean", "robust_linf_0.3_pgd_100x10", "certified_linf_0.1", "certified_linf_0.3")
        assert cells == [f"{100 * figures[key]['accuracy']:.1f}" for key in keys], name


@pytest.mark.parametrize("name", ["methods", "flags", "store"])
def test_pages_made_from_the_code_are_up_to_date(name):
    page = runpy.run_path(str(ROOT / "docs" / f"{name}.py"))["page"]()
    assert (ROOT / "docs" / f"{name}.md").read_text() == page, f"run: python docs/{name}.py > docs/{name}.md"
