"""The `runrecovery` command. Each subcommand's module is imported when it is called."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Final, NoReturn

import click

from runrecovery_service import __version__, early_signals
from runrecovery_service.background_stream import drain_stderr
from runrecovery_service.cli import streams
from runrecovery_service.cli.failure import Failure
from runrecovery_service.lazy_dataclass import dataclass

FAILED: Final = 1
INTERRUPTED: Final = early_signals.INTERRUPTED
THREADS_S: Final = 10.0
"""How long to wait at the end for threads that the command started."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A subcommand: its module in this package, its name in the module, its line in the help."""

    module: str
    name: str
    summary: str


COMMANDS: Final[Mapping[str, _Entry]] = {
    "serve": _Entry("local", "serve", "Run the service until SIGTERM or Ctrl-C."),
    "demo": _Entry("local", "demo", "Kill a service under nine runs, and explain each decision."),
    "runs": _Entry("runs", "runs", "Create, show, watch, answer and cancel runs."),
    "recovery": _Entry("recovery", "recovery", "Show what restarts decided, and why."),
    "prune": _Entry("prune", "prune", "Remove old runs, files and reports now."),
    "webhooks": _Entry("webhooks", "webhooks", "Show webhooks, and try their deliveries at once."),
    "instances": _Entry("instances", "instances", "Show the instances that use the database."),
    "health": _Entry("health", "health", "Check whether the service is SERVING."),
    "check": _Entry("local", "check", "Check configuration, engines and database."),
    "migrate": _Entry("local", "migrate", "Migrate the database of a stopped service."),
    "backup": _Entry("local", "backup", "Back up the SQLite database, of a running service too."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = getattr(import_module(f"{__name__}.{entry.module}"), entry.name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own implementation would import every command for its summary.
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="runrecovery")
def root() -> None:
    """Run long, interactive agents, and give every run a decision after a restart."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (sys.argv by default) and exit with one of `exit_codes.ExitCode`."""
    streams.prepare()
    # Keeps gRPC's own lines off standard error: writing them would block while nobody reads.
    # gRPC reads this variable when a command imports it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    serves = (sys.argv[1:] if arguments is None else arguments)[:1] == ["serve"]
    if serves:
        # A start makes objects that stay, so garbage collections would cost time and find nothing.
        # `app` enables them again.
        gc.disable()
    try:
        if not serves:
            early_signals.restore_ctrl_c()
        code = root.main(arguments, prog_name="runrecovery", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as failure:
        failure.show()
        code = failure.exit_code
        if isinstance(failure, Failure) and failure.closes_nothing:
            drain_stderr()
            os._exit(code)
    except click.Abort:
        code = INTERRUPTED
    except streams.OutputFailed as failed:
        code = FAILED
        if not failed.no_reader:  # a reader that stops, as in `… | head -1`, is no error
            click.echo(f"error: standard output: {failed}", err=True)
    drain_stderr()
    if _threads_hang():
        os._exit(code or 0)  # `sys.exit` would wait for the threads, perhaps without end
    sys.exit(code or 0)


def _threads_hang() -> bool:
    """Wait for the remaining threads. Return True if one does not end, as on a hanging disk."""
    deadline = time.monotonic() + THREADS_S
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                return True
    return False
