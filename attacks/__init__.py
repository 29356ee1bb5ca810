if __name__ != "robustbench_lite.attacks":
    raise ImportError("this folder is the package robustbench_lite.attacks: write 'import robustbench_lite.attacks' (not 'attacks')")
