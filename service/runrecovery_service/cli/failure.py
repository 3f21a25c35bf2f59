"""The error that ends a command: sentence, hint and exit code."""

from __future__ import annotations

from typing import IO, Any

import click

from runrecovery_service.cli.exit_codes import ExitCode
from runrecovery_service.cli.plain_text import safe


class Failure(click.ClickException):
    """Ends the command with one sentence on standard error, an optional hint, and an exit code.

    If `closes_nothing` is true, the process exits without the clean-up of the interpreter, because
    the clean-up would close database connections.
    """

    def __init__(
        self, sentence: str, *, code: ExitCode, hint: str = "", closes_nothing: bool = False
    ) -> None:
        super().__init__(sentence)
        self.closes_nothing = closes_nothing
        self.exit_code = code  # type: ignore[misc] # click reads it from the instance
        self.hint = hint

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the sentence and the hint."""
        text = f"error: {self.message}" + (f"\nhint: {self.hint}" if self.hint else "")
        for line in text.split("\n"):
            click.echo(safe(line), file=file, err=file is None)
