"""How well a score tells attacked images from clean ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import rankdata

__all__ = ["area_under_curve"]


def area_under_curve(clean: np.ndarray[Any, Any], attacked: np.ndarray[Any, Any]) -> float:
    """Return the area under the ROC curve of scores that should be larger for attacked images.

    It is the probability that an attacked image has a larger score than a clean one, ties counted half: the statistic
    of Mann and Whitney 1947. 0.5: the score says nothing; 0: it says the opposite.

    Args:
        clean: scores (n,).
        attacked: scores (m,).

    Raises:
        ValueError: one of them is empty, or has a NaN.

    Example:
        >>> area_under_curve(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
        0.875
    """
    if len(clean) == 0 or len(attacked) == 0 or np.isnan(clean).any() or np.isnan(attacked).any():
        raise ValueError(
            f"expected scores without NaN on both sides, got {len(clean)} clean and {len(attacked)} attacked"
        )
    ranks = rankdata(np.concatenate([attacked, clean]))[: len(attacked)]
    above = float(ranks.sum()) - len(attacked) * (len(attacked) + 1) / 2
    return above / (len(attacked) * len(clean))
