"""What can go wrong for a user, each with a message of one sentence. A ValueError is bad input."""

from __future__ import annotations

import signal


class UsageError(ValueError):
    """The command line asks for something that cannot be done."""


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message names the folder."""


class CheckpointError(ValueError):
    """A checkpoint file that is missing, torn, foreign or too new; the message names the file."""


class NoGroundTruth(ValueError):
    """Average precision is undefined: the images hold no object to be found."""


class RunFailed(RuntimeError):
    """A run that cannot go on; the message says why and at which step."""


class NonFiniteLoss(RunFailed):
    """The loss or its gradient is NaN or infinite; the message names the part and the step."""


class Interrupted(Exception):
    """A signal asked a run to stop; the checkpoint that stands holds everything up to ``step``."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}, which last.pt holds")
        self.exit_code = 128 + signum
