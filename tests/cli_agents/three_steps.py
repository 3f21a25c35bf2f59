"""A scripted model that has its CLI run three commands, one after another, over interruptions."""

from __future__ import annotations

import json
import threading
import uuid
from enum import Enum
from pathlib import Path
from typing import Final

from cli_agents.model_endpoint import ModelRequest, Reply, question_then_result

STEPS: Final = (1, 2, 3)
STEP_S: Final = 0.5
"""How long a command takes if the turn stops nowhere. So a kill comes before the turn's end."""
TASK: Final = "THREE STEPS"
"""Words in the prompt of a run that this model works on."""


class Moment(Enum):
    """Where the turn stops until it is killed."""

    NOWHERE = "nowhere"
    REQUEST_OPEN = "with the first request open"
    IN_A_TOOL = "in a tool"
    AFTER_A_RESULT = "after the tool's result"


class ThreeSteps:
    """The model calls the command of the first step whose result it does not see, then it ends.

    Every call has an id of its own, which its command appends to the file `begun` when it begins
    and to the file `ended` when it ends. So an id that stands there twice is a command that the
    CLI or the service ran twice by itself. The model does not obey the notice: it calls the
    command of an interrupted step again, under a new id.
    """

    def __init__(self, folder: Path, moment: Moment = Moment.NOWHERE) -> None:
        self._folder = folder
        self._moment = moment
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, request: ModelRequest) -> Reply:
        """Return the reply to one request."""
        if not (request.offers_tools and request.contains(TASK)):
            return question_then_result(request)
        done = [step for step in STEPS if f"finished step {step}" in request.raw]
        if len(done) == len(STEPS):
            return Reply(json.dumps({"result": {"steps": done}}))
        step = next(each for each in STEPS if each not in done)
        reply = Reply(command=self._command(step))
        if self._stops(step, done):
            return Reply('{"result": {"never": "sent"}}', hangs=True)
        return reply

    @property
    def at_the_moment(self) -> bool:
        """Whether the turn has reached the moment at which it stops."""
        return self._stopped or (self._folder / "in-tool").exists()

    def begun(self, folder: str = "begun") -> list[str]:
        """Return the id of each command that has begun, as often as it has."""
        path = self._folder / folder
        return path.read_text().split() if path.exists() else []

    def _stops(self, step: int, done: list[int]) -> bool:
        """Return whether the model leaves this request open. It does so once."""
        wanted = {Moment.REQUEST_OPEN: step == 1, Moment.AFTER_A_RESULT: done == [1]}
        with self._lock:
            stops = wanted.get(self._moment, False) and not self._stopped
            self._stopped |= stops
            return stops

    def _command(self, step: int) -> str:
        """Return a command whose text does not contain what it prints."""
        call = f"{step}-{uuid.uuid4().hex}"
        begun, ended, in_tool = (self._folder / name for name in ("begun", "ended", "in-tool"))
        hang = ""
        if self._moment is Moment.IN_A_TOOL and step == 2:
            hang = f"test -e {in_tool} || {{ touch {in_tool}; sleep 300; }}; "
        elif self._moment is Moment.NOWHERE:
            hang = f"sleep {STEP_S}; "
        print_it = f"printf '%s step %s' finished {step}"
        return f"echo {call} >> {begun}; {hang}echo {call} >> {ended}; {print_it}"
