"""The `rbl` command: Hydra applications over the configs of `robustbench_lite.conf`."""
