"""What a bound says when it meets something it cannot bound."""

from __future__ import annotations

__all__ = ["UnsupportedOperator"]


class UnsupportedOperator(ValueError):  # noqa: N818 - it names what was met, like the errors of torch.export
    """A model uses an operator, or a form of one, that no sound rule is known for.

    The message names the node, the module it belongs to, and the supported operators.
    """
