"""Errors that a user may meet, each with a message of one sentence. A ValueError is bad input."""

from __future__ import annotations

import signal


class UsageError(ValueError):
    """The command line asks for something that cannot be done."""


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message names the folder."""


class CheckpointError(ValueError):
    """A checkpoint file that is missing, torn, foreign or too new; the message names the file."""


class WriteError(OSError):
    """A file that cannot be written; the message names the file, the cause and what stands."""


class NoGroundTruth(ValueError):
    """Average precision is undefined: the images hold no object to be found."""


class RunFailed(RuntimeError):
    """A run that cannot go on; the message says why and at which step."""


class NonFiniteLoss(RunFailed):
    """The loss, its gradient, the weights or what they compute is NaN or infinite; the message names the part."""


class Interrupted(Exception):
    """A signal asked a run to stop, whose last checkpoint holds everything up to ``step``; or, without one, several."""

    def __init__(self, signum: int, step: int | None = None) -> None:
        held = "" if step is None else f" at step {step}, which last.pt holds"
        super().__init__(f"stopped by {signal.Signals(signum).name}{held}")
        self.exit_code = 128 + signum
