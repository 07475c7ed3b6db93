"""The Triton twin of each op, a module of its name, imported at its first call: `import route_kernels` imports none."""
