"""Hydra configs: one folder a group, one file a choice."""

if __name__ != "robustbench_lite.conf":
    raise ImportError("this folder is the package robustbench_lite.conf: write 'import robustbench_lite.conf'")
