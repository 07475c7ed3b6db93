"""The planner of a training step's memory, and its command: no GPU, no allocation, the same bytes every time."""
