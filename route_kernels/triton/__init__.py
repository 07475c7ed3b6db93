"""The Triton twin of each op: one file an op, imported at its first call; importing `route_kernels` imports none."""
