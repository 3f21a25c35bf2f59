"""Whether a call had the effect that it asked for, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from fuzz import wire
from fuzz.calls import Outcome
from fuzz.cases import OURS, Case, changes
from fuzz.lexicon import run_id
from fuzz.oracle import Fault, Found, Oracle, parsed, request_problems
from fuzz.store import changed
from fuzz.target import Target
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from runrecovery.v1 import run_pb2

MAX_PAGE, DEFAULT_PAGE = 1000, 50
Code = grpc.StatusCode


class EffectChecker:
    """Plays cases against a target, and checks their effects."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._oracle = Oracle()
        self._version = target.store.version()
        self._rows = target.store.rows()

    def play(self, case: Case) -> tuple[Outcome, list[Found]]:
        """Make a call, and return how it ended and what was wrong with that."""
        payload = self._target.lexicon.fill(case.payload)
        request = parsed(case, payload) if case.method in OURS else None
        bad = _why_bad(case, request)
        outcome = self._target.caller.call(case, payload, patient=bad is not None)
        found = list(self._oracle.judge(case, payload, outcome, bad=bad))
        if request is not None and outcome.is_ok and outcome.answers:
            found += self._answered(case, request, outcome.answers[0])
        found += self._left(case, request, outcome)
        return outcome, found

    def unchanged(self) -> Iterator[Found]:
        """Yield what has changed since the last case."""
        for key in self._differences():
            yield Fault.STATE, f"changed: {key}"

    # -- the store ---------------------------------------------------------------------------------

    def _differences(self) -> dict[tuple[object, ...], object]:
        version = self._target.store.version()
        if version == self._version:
            return {}
        before, self._version, self._rows = self._rows, version, self._target.store.rows()
        return changed(before, self._rows)

    def _left(self, case: Case, request: Message | None, outcome: Outcome) -> Iterator[Found]:
        """Yield what the store contains and should not contain."""
        is_unsure = outcome.code in {Code.CANCELLED, Code.DEADLINE_EXCEEDED}
        method = OURS.get(case.method)
        if method is None or not changes(method) or not (outcome.is_ok or is_unsure):
            yield from self.unchanged()
            return
        if is_unsure:
            self._let_it_arrive()
        restless = set(self._target.store.restless().values())
        earlier = {owner for owner, _ in self._rows.values()}
        named = self._target.store.keys_of(*_named(request, outcome, case))
        for key, owner in self._differences().items():
            is_new = owner not in earlier and method.name == "CreateRun"
            if owner is None or not (owner in named or owner in restless or is_new):
                yield Fault.STATE, f"changed, and not of the run that was named: {key}"
        self._target.repair()
        self._differences()

    def _let_it_arrive(self) -> None:
        """Return once the calls before this one have had their effect.

        The calls of one connection begin in order, their writes are done in order, and an OK comes
        after the commit. A refusal would prove nothing: it may come before the commit of earlier
        writes.
        """
        payload = wire.sized(1, self._target.lexicon.fill(run_id("canceled").encode()))
        again = Case(method="/runrecovery.v1.RunService/CancelRun", payload=payload)
        outcome = self._target.caller.call(again, payload)
        if not outcome.is_ok:
            raise AssertionError(f"to cancel again ended with {outcome.code}")

    # -- answers -----------------------------------------------------------------------------------

    def _answered(self, case: Case, request: Any, answer: bytes) -> Iterator[Found]:
        method = OURS[case.method]
        response: Any = GetMessageClass(method.output_type).FromString(answer)
        wanted = getattr(request, "run_id", "")
        if "run" in response.DESCRIPTOR.fields_by_name and wanted not in {"", response.run.run_id}:
            yield Fault.EFFECT, f"{response.run.run_id} instead of {wanted}"
        if hasattr(request, "page_size"):
            most = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
            rows = next(value for field, value in response.ListFields() or [(None, [])])
            if not isinstance(rows, str) and len(rows) > most:
                yield Fault.EFFECT, f"{len(rows)} rows of {most}"
        check = {"CreateRun": self._created, "SubmitReply": self._replied, "CancelRun": _canceled}
        if method.name in check and not check[method.name](request, response.run):
            yield Fault.EFFECT, f"{method.name} answered otherwise than it was asked"

    def _created(self, request: Any, told: run_pb2.Run) -> bool:
        run = self._target.api.get(told.run_id)
        policy = request.restart_policy or run_pb2.RESTART_POLICY_FAIL
        return (
            all(_plain(each.input) == _plain(request.input) for each in (run, told))
            and dict(run.labels) == dict(request.labels) == dict(told.labels)
            and (run.engine, run.restart_policy) == (request.engine, policy)
        )

    def _replied(self, request: Any, told: run_pb2.Run) -> bool:
        asked = self._target.api.interactions(told.run_id)
        kept = [one.response for one in asked if one.interaction_id == request.interaction_id]
        return [_plain(one) for one in kept] == [_plain(request.response)]


def _canceled(_: Any, told: run_pb2.Run) -> bool:
    return told.cancel_requested or told.status == run_pb2.RUN_STATUS_CANCELED


def _why_bad(case: Case, request: Message | None) -> str | None:
    if case.method not in OURS:
        return None
    if request is None:
        return "bytes that are no message"
    return next(request_problems(request), None)


def _named(request: Message | None, outcome: Outcome, case: Case) -> list[str]:
    named = [getattr(request, "run_id", "")]
    for answer in outcome.answers:
        response: Any = GetMessageClass(OURS[case.method].output_type).FromString(answer)
        if "run" in response.DESCRIPTOR.fields_by_name:
            named.append(response.run.run_id)
    return [name for name in named if name]


def _plain(value: Any) -> object:
    """Return a Struct or Value as plain JSON. Every null counts, whatever number it has."""
    if value.DESCRIPTOR.name == "Struct":
        return {key: _plain(item) for key, item in value.fields.items()}
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return _plain(value.struct_value)
    if kind == "list_value":
        return [_plain(item) for item in value.list_value.values]
    return (kind, None if kind == "null_value" else getattr(value, kind))
