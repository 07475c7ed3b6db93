"""Figures of the ops and of a training step: both sides verified first, then timed in turns."""
