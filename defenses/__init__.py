if __name__ != "robustbench_lite.defenses":
    raise ImportError("this folder is the package robustbench_lite.defenses: write 'import robustbench_lite.defenses' (not 'defenses')")
