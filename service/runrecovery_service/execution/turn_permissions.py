"""Detects whether the answer to a permission question was used in the turn that got it.

The agent gets the answer not in its input, but from its permission hook. The hook creates a file
before the tool call can begin. If the file exists, the process has used the answer.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.domain.run import Interaction
from runrecovery_service.engines.permissions import deferred_calls, returns_to_call, used_mark
from runrecovery_service.execution.turn_records import TurnRecords
from runrecovery_service.lazy_dataclass import dataclass

LOOK_S: Final = 0.1
USED_BEFORE: Final = "The permission was already used by a process that was lost with the service."


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnPermissions:
    """The answer to a permission question that a turn gets. Most turns get none."""

    records: TurnRecords
    workspaces: Workspaces

    @property
    def folder(self) -> Path:
        """The folder with the files of the permission hook."""
        run = self.records.turn.run
        return self.workspaces.permissions(run.key, run.attempt)

    def deferred(self) -> frozenset[str]:
        """The ids of the tool calls that the hook deferred in earlier turns. Blocks briefly."""
        return deferred_calls(self.folder, self.records.turn.run.turn)

    @property
    def answer(self) -> Interaction | None:
        """The turn's reply if the hook passes it to the agent; None: any reply is in the input."""
        reply = self.records.turn.reply
        return reply if returns_to_call(reply) else None

    async def wait_until_used(self) -> None:
        """Wait until the hook has given the answer."""
        while True:
            if self.is_used:
                return
            await asyncio.sleep(LOOK_S)

    @property
    def is_used(self) -> bool:
        """Whether the hook has given the answer, so that the tool call has possibly begun."""
        return self.answer is not None and used_mark(self.folder, self.answer).exists()

    async def record_if_used(self) -> bool:
        """If the hook has given the answer, record it as delivered, and return True."""
        if self.answer is None or not self.is_used:
            return False
        await self.records.record_reply_read(self.answer.interaction_id)
        return True
