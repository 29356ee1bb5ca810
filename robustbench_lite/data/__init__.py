"""Data: images in [0, 1] with labels, fixed splits, and names that depend on content alone.

Importing this imports neither torchvision nor scikit-learn; a data set does when it is loaded.
"""

from __future__ import annotations

from robustbench_lite.data.base import Dataset
from robustbench_lite.data.loading import load_data

__all__ = ["Dataset", "load_data"]
