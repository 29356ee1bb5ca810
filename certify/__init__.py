if __name__ != "robustbench_lite.certify":
    raise ImportError("this folder is the package robustbench_lite.certify: write 'import robustbench_lite.certify' (not 'certify')")
