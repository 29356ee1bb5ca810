"""What a bound says when it meets something it cannot bound."""

from __future__ import annotations

from robustbench_lite.core.errors import NotApplicableError

__all__ = ["CannotCertify", "UnsupportedOperator"]


class CannotCertify(NotApplicableError):  # noqa: N818 - it names what was found
    """A certifier can say nothing about a model, whatever the sample."""


class UnsupportedOperator(CannotCertify):
    """A model uses an operator, or a form of one, that no sound rule is known for.

    The message names the node, the module it belongs to, and the supported operators.
    """
