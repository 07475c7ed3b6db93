"""A folder for `sys.path`: what it holds is imported under the name that research code knows."""
