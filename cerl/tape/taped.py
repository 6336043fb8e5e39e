"""A function that is played from a tape from some call on, if a tape can repeat it."""

import os
from collections.abc import Callable

import torch

from cerl.tape.plan import Tape, plan
from cerl.tape.record import record

WARM_UP = 3  # calls before the one that is recorded
# The check of a tape copies what the function changes; no tape is made where that has more bytes.
MOST_CHECKED = 256 << 20
OFF = "CERL_EAGER"  # environment variable: if set, functions run as they are written


class Taped:
    """Calls a function as it is written, records a call, checks the tape, then plays the tape.

    All calls are real: the k-th one is the k-th step, however it is made. The call after the
    recorded one is made twice, by the tape and by the function from the same state. Unless every
    byte is equal, and where no tape can be made, the function runs as it is written for good.

    `why` says why no tape is played; it is empty as long as one may be.

    Args of the constructor: step, a function that writes its results into existing tensors and
    never rebinds a name to a new tensor, as `cerl.graph.captured` requires.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self.step, self.calls = step, 0
        self.tape: Tape | None = None
        self.checked = False
        self.why = f"{OFF} is set" if os.environ.get(OFF) else ""

    def __call__(self) -> None:
        if self.checked and self.tape is not None:
            self.tape.play()
        elif self.why or self.calls < WARM_UP:
            self.step()
        elif self.tape is None:
            self._record()
        else:
            self._check(self.tape)
        self.calls += 1

    def _record(self) -> None:
        found = record(self.step)
        if isinstance(found, str):
            self.why = found
            return
        try:
            tape = plan(found)
        except NotImplementedError as error:
            self.why = str(error)
            return
        if sum(map(len, tape.writes)) > MOST_CHECKED:
            self.why = "it changes too much to check a tape of it"
        else:
            self.tape = tape

    def _check(self, tape: Tape) -> None:
        """Makes a call by the tape and by the function, and compares what they changed."""
        before = [changed.clone() for changed in tape.writes]
        try:
            tape.play()
        except (NotImplementedError, RuntimeError, TypeError) as error:  # of another torch version
            self.tape, self.why = None, f"a tape of it cannot be played: {error}"
        played = [changed.clone() for changed in tape.writes]
        for changed, old in zip(tape.writes, before, strict=True):
            changed.copy_(old)
        self.step()
        if self.tape is not None and not all(map(torch.equal, played, tape.writes)):
            self.tape, self.why = None, "a tape of it does not give the same bits"
        self.checked = True
