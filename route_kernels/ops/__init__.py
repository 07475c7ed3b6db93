"""One file an op: equation, shapes, contract check, fake, autograd, autocast and backend table."""
