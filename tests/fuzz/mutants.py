"""The service with one thing broken, without a change of its files.

    python mutants.py NAME PYTHON -m runrecovery_service serve …

A campaign that does not detect each of them proves nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """How to break the service, and the names of the faults (`oracle.Fault`) that reveal it."""

    breaks: Callable[[], None]
    faults: frozenset[str]


def _break(owner: object, name: str, broken: Callable[..., Any]) -> None:
    """Replace an attribute, which must exist, by a broken one."""
    getattr(owner, name)
    setattr(owner, name, broken)


def let_escape() -> None:
    """Let every error escape to gRPC, which answers UNKNOWN."""
    from runrecovery_service.rpc import method_wrapper

    async def escape(_: object, __: object, error: Exception) -> None:
        raise error

    _break(method_wrapper, "_abort", escape)


def write_when_refused() -> None:
    """Write to the store although a cancel is refused."""
    from runrecovery_service.domain.errors import RunRecoveryError
    from runrecovery_service.rpc.run_service import RunService

    cancel = RunService.cancel_run

    async def cancel_and_trace(self: Any, request: Any) -> Any:
        try:
            return await cancel(self, request)
        except RunRecoveryError:
            await self._storage.write(
                lambda db: db.execute("UPDATE run SET turn = turn + 1 WHERE id = 1", ())
            )
            raise

    _break(RunService, "cancel_run", cancel_and_trace)


def tell_a_path() -> None:
    """Name a file of ours in every refusal."""
    from runrecovery_service.rpc import errors

    status_of = errors.status_of
    _break(
        errors,
        "status_of",
        lambda error: replace(status_of(error), message=f"{error} at {errors.__file__}"),
    )


def tell_handles() -> None:
    """Show session handles."""
    from runrecovery_service.rpc import run_messages

    put = run_messages._fill_optional_fields

    def put_all(to: Any, run: Any) -> None:
        put(to, run)
        if run.session is not None:
            to.session.type = run.session.handle

    _break(run_messages, "_fill_optional_fields", put_all)


def forget_labels() -> None:
    """Record runs without their labels."""
    from runrecovery_service.rpc.run_service import RunService

    new_run = RunService._new_run
    _break(RunService, "_new_run", lambda *given: replace(new_run(*given), labels={}))


def take_any_page_size() -> None:
    """Accept every page size."""
    from runrecovery_service.rpc import paging, validation

    _break(validation, "_page_size", lambda _: iter(()))
    _break(paging, "page_size", lambda size: min(abs(size) or 50, 1000))


def talk_too_much() -> None:
    """Report every invalid field, without a limit."""
    from runrecovery_service.rpc import errors

    errors.MAX_VIOLATIONS = errors.MAX_VIOLATIONS_BYTES = 1_000_000  # type: ignore[misc]


def hoard() -> None:
    """Keep memory for every call, for ever."""
    from runrecovery_service.rpc.method_wrapper import MethodWrapper

    kept: list[bytes] = []
    check = MethodWrapper._check_call_limit

    def check_and_keep(self: Any, *given: Any) -> None:
        kept.append(bytes(512 << 10))
        check(self, *given)

    _break(MethodWrapper, "_check_call_limit", check_and_keep)


def let_every_role_in() -> None:
    """Let each caller make every call."""
    from runrecovery_service.domain.caller import Caller

    _break(Caller, "demand_role", lambda *_: None)


MUTANTS: Final[dict[str, Mutant]] = {
    "unknown": Mutant(breaks=let_escape, faults=frozenset({"STATUS"})),
    "writes": Mutant(breaks=write_when_refused, faults=frozenset({"STATE"})),
    "path": Mutant(breaks=tell_a_path, faults=frozenset({"LEAK"})),
    "handle": Mutant(breaks=tell_handles, faults=frozenset({"LEAK"})),
    "labels": Mutant(breaks=forget_labels, faults=frozenset({"EFFECT"})),
    "pages": Mutant(breaks=take_any_page_size, faults=frozenset({"ACCEPTED"})),
    "verbose": Mutant(breaks=talk_too_much, faults=frozenset({"DETAILS", "STATUS"})),
    "roles": Mutant(breaks=let_every_role_in, faults=frozenset({"ACCEPTED", "STATUS"})),
    "hoard": Mutant(breaks=hoard, faults=frozenset({"MEMORY"})),
}

if __name__ == "__main__":
    from runrecovery_service.cli import main

    name, _, _, _, *arguments = sys.argv[1:]  # of the service: python -m runrecovery_service
    MUTANTS[name].breaks()
    main(arguments)
