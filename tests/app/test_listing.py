"""`rbl list` shows every config of every group, with what it is."""

from __future__ import annotations

import pytest

from robustbench_lite.app.docstrings import summary_of
from robustbench_lite.app.listing import GROUPS, entries
from robustbench_lite.core import registry


@pytest.mark.parametrize("plural", GROUPS)
def test_all_is_listed_with_a_summary(rbl, plural: str) -> None:
    group = GROUPS[plural][0]
    found = entries(plural)
    assert [entry.name for entry in found] == list(registry.groups(group))
    assert all(entry.summary for entry in found)
    status, out, _ = rbl("list", group)
    assert (status, out) == rbl("list", plural)[:2]
    assert status == 0
    assert all(entry.name in out for entry in found)


def test_without_a_group_the_groups(rbl) -> None:
    assert all(name in rbl("list")[1] for name in GROUPS)


def test_the_zoo_is_listed(rbl, zoo) -> None:
    out = rbl("list", "defenses")[1]
    assert "digits/a" in out
    assert "ten means over 60 images" in out
    assert "ibp_training" in out


def test_unknown_group(rbl) -> None:
    status, _, err = rbl("list", "atacks")
    assert status == 2
    assert "did you mean 'attacks'" in err


def test_summaries_are_the_docstrings() -> None:
    from robustbench_lite.attacks import PGD
    from robustbench_lite.data.digits import digits

    assert summary_of("robustbench_lite.attacks.PGD") == (PGD.__doc__ or "").partition("\n")[0]
    assert summary_of("robustbench_lite.data.digits.digits") == (digits.__doc__ or "").partition("\n")[0]
    assert summary_of("no.such.thing") == ""
