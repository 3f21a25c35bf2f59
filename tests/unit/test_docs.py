"""The pages document every name: keys, calls, reasons, events, exit codes."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from enum import StrEnum
from pathlib import Path
from typing import Final

import pytest
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from runrecovery.v1 import errors_pb2, recovery_service_pb2, run_pb2, run_service_pb2
from runrecovery_service.cli import COMMANDS
from runrecovery_service.cli.exit_codes import ExitCode
from runrecovery_service.config import reading
from runrecovery_service.config.reloading import RELOADABLE
from runrecovery_service.config.settings import (
    CallerSettings,
    EngineSettings,
    RetentionSettings,
    Settings,
    TlsSettings,
    TraceSettings,
    WebhookSettings,
)
from runrecovery_service.domain.recovery_matrix import MATRIX, QUARANTINE_RULE, Fact
from runrecovery_service.domain.run import ErrorCode
from runrecovery_service.logs import LOGGED_EVENTS, LOGGED_LINES
from runrecovery_service.metric_counters import Meters
from runrecovery_service.metrics.exposition import render
from runrecovery_service.metrics.gauges import GAUGES
from runrecovery_service.rpc import errors
from runrecovery_service.rpc.health import NAMES
from runrecovery_service.rpc.method_roles import ROLES
from support.syntax_trees import syntax_trees

ROOT: Final = Path(__file__).parents[2]
SERVICE: Final = ROOT / "service" / "runrecovery_service"
LEVELS: Final = {"debug", "info", "warning", "error", "exception", "critical", "_log", "_warn"}
EVENT: Final = re.compile(r"[a-z]+\.[a-z_]+")
LINK: Final = re.compile(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)")
FILE_NAME: Final = re.compile(r"\.(py|md|proto|toml|txt|json|svg|binpb)$")
CODE_BLOCK: Final = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
NAMED_PAGE: Final = re.compile(r"\b(docs/\w+\.md)\b(#[\w-]+)?")
NAMED_TEST: Final = re.compile(r"`(test_[a-z_0-9]+)`")
NAMED_SECTION: Final = re.compile(r"(docs/\w+\.md), \*([^*]+)\*")
METHODS: Final = [
    method
    for file in (run_service_pb2, recovery_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
PAGES: Final = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("[bc]*/README.md")]
)
IMAGE: Final = ROOT / "docs" / "states.svg"


def _page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _section(page: str, heading: str) -> str:
    """Return the lines below a heading, up to the next one of its level or above."""
    _, _, rest = page.partition(f"\n{heading}\n")
    level = heading.split(" ", maxsplit=1)[0]
    return re.split(rf"\n#{{1,{len(level)}}} ", rest)[0]


def _rows(text: str) -> dict[str, str]:
    """Return the second cell of every table row, by its first one without backticks."""
    cells = (
        re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")
    )
    return {row[0].strip().strip("`"): row[1].strip() for row in cells}


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return json.dumps(list(default))
    if default is None or default == {}:
        return "none"
    if isinstance(default, bool | int | float):
        return str(default).lower()
    if isinstance(default, StrEnum):
        return f'"{default.lower()}"'  # as it is written in a configuration file
    return f'"./{default}"' if isinstance(default, Path) else f'"{default}"'


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("TLS", TlsSettings),
        ("Callers", CallerSettings),
        ("Retention", RetentionSettings),
        ("Traces", TraceSettings),
        ("Webhooks", WebhookSettings),
    ],
)
def test_every_key_of_a_table_is_documented_with_its_default(heading: str, kind: type) -> None:
    told = _rows(_section(_page("docs/configuration.md"), f"## {heading}"))

    assert {key.name: told[key.name].strip("`") for key in fields(kind)} == {
        key.name: "required" if key.default is MISSING else _shown(key.default)
        for key in fields(kind)
    }


def test_the_page_has_the_table_of_roles_as_it_is_enforced() -> None:
    page = _section(_page("docs/security.md"), "## What each role may do")

    assert [method for method in ROLES if f"| `{method}` |" not in page] == []


def _configuration() -> tuple[dict[str, str], dict[str, str]]:
    page = _page("docs/configuration.md")
    return _rows(_section(page, "## The service")), _rows(_section(page, "## Engines"))


def test_every_configuration_key_is_documented_with_its_default() -> None:
    told, _ = _configuration()
    del told["key"]  # the heading
    settings = Settings()

    assert {key: text.strip("`") for key, text in told.items()} == {
        key.name: _shown(getattr(settings, key.name)) for key in fields(Settings)
    }


def test_the_pages_name_the_keys_that_a_reload_takes_over() -> None:
    sentence = re.search(
        r"takes over changes of these keys at a [^:]*: ([^.]*)\. Every",
        _page("docs/configuration.md"),
    )
    rows = _rows(_section(_page("docs/operations.md"), "## Reload"))

    assert sentence is not None
    assert set(re.findall(r"`(\w+)`", sentence[1])) == RELOADABLE
    assert rows.keys() - {"key"} == RELOADABLE


def test_every_engine_key_is_documented_with_its_default() -> None:
    _, told = _configuration()
    defaults = {
        key.name: "required" if key.name in {"command", "profile"} else _shown(key.default)
        for key in fields(EngineSettings)
    }

    assert {key: text.strip("`") for key, text in told.items() if key in defaults} == defaults


def test_every_error_reason_is_documented_with_its_code() -> None:
    told = _rows(_section(_page("docs/errors.md"), "## Refused calls"))
    sent = {case.reason: case.code.name for case in errors.TABLE.values()}
    sent[errors_pb2.ERROR_REASON_INTERNAL] = "INTERNAL"
    reasons = {
        errors_pb2.ErrorReason.Name(number).removeprefix("ERROR_REASON_"): code
        for number, code in sent.items()
    }

    assert {reason: told.get(reason) for reason in reasons} == reasons
    assert len(reasons) == len(errors_pb2.ErrorReason.keys()) - 1


def _fields(message: Descriptor | None) -> Iterator[str]:
    """Yield the names of a request's fields, and of those of its filter instead of `filter`."""
    for field in message.fields if message is not None else ():
        if field.name == "filter":
            yield from _fields(field.message_type)
        else:
            yield field.name


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_call_is_documented_with_the_fields_of_its_request(method: MethodDescriptor) -> None:
    page = _page("docs/api.md")
    section = _section(page, f"### {method.name}")

    assert f"/{method.containing_service.full_name}/{method.name}\n" in section
    assert f"| `{method.containing_service.name}/{method.name}` |" in page
    assert [
        name
        for name in _fields(method.input_type)
        if not re.search(rf"`(\w+\.)?{name}[`.]", section)
    ] == []


def test_every_recovery_field_and_status_is_documented() -> None:
    run = _section(_page("docs/api.md"), "## A run")

    names = [field.name for field in run_pb2.RecoveryInfo.DESCRIPTOR.fields]
    assert [name for name in names if f"`{name}`" not in run] == []
    statuses = run_pb2.RunStatus.DESCRIPTOR.values_by_name
    assert [name for name in statuses if f"`{name}`" not in run] == []


def test_every_rule_error_code_and_recovery_state_is_documented() -> None:
    page = _page("docs/recovery.md")
    states = [
        name.removeprefix("RECOVERY_STATE_")
        for name in run_pb2.RecoveryState.DESCRIPTOR.values_by_name
        if not name.endswith("UNSPECIFIED")
    ]
    words = [*(rule.name for rule in MATRIX), QUARANTINE_RULE, *states]
    codes = _rows(_section(_page("docs/errors.md"), "## Failed runs"))

    assert [word for word in words if word not in page] == []
    assert [code for code in ErrorCode if code not in codes] == []


def test_every_fact_of_the_matrix_is_explained() -> None:
    page = _page("docs/recovery.md")

    assert [fact.name for fact in Fact if f"**{fact.name}**" not in page] == []


def test_every_health_name_is_documented() -> None:
    health = _section(_page("docs/api.md"), "## Health")

    assert [name for name in NAMES if f"`{name}`" not in health and name] == []


def _events() -> Iterator[str]:
    """Yield the event of every call that logs, and of every periodic task that may fail."""
    for _, tree in syntax_trees(SERVICE, "log", "failure_event"):
        for node in ast.walk(tree):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr=attribute), args=[ast.Constant(value=str(name)), *_]
                ) if attribute in LEVELS and EVENT.fullmatch(name):
                    yield name
                case ast.keyword(arg="failure_event", value=ast.Constant(value=str(name))):
                    yield name


def test_events_in_the_code_are_the_events_on_the_page() -> None:
    told = {name for name in _rows(_page("docs/events.md")) if EVENT.fullmatch(name)}

    assert told == set(_events())


def test_metrics_in_the_code_are_the_metrics_on_the_page_with_their_labels() -> None:
    meters = (*Meters(), LOGGED_EVENTS, LOGGED_LINES)
    made = {meter.name: meter.labels for meter in (*meters, *GAUGES)}
    process = re.findall(r"^runrecovery_process_\w+", render([]).decode(), re.MULTILINE)
    cells = re.findall(
        r"^\| `(runrecovery_\w+)` \| \w+ \|([^|]*)\|", _page("docs/metrics.md"), re.MULTILINE
    )

    assert {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels in cells} == (
        made | dict.fromkeys(process, ())
    )


def test_every_exit_code_is_documented() -> None:
    told = _rows(_section(_page("docs/errors.md"), "## Exit codes"))

    assert {str(int(code)): code.name for code in ExitCode}.items() <= told.items()


def test_every_command_is_documented() -> None:
    page = _page("docs/commands.md")

    assert [name for name in COMMANDS if f"`runrecovery {name}" not in page] == []


def test_example_configuration_is_accepted() -> None:
    settings = reading.load(path=ROOT / "runrecovery.example.toml", flags={}, environ={})

    assert sorted(settings.engines) == ["demo", "demo-sticky"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_between_pages_has_its_target(page: Path) -> None:
    broken = [
        f"{target}{anchor}"
        for target, anchor in LINK.findall(page.read_text(encoding="utf-8"))
        if not _leads_somewhere(page.parent / target if target else page, anchor)
    ]

    assert broken == []


def _leads_somewhere(target: Path, anchor: str) -> bool:
    if not anchor:
        return target.exists()
    text = CODE_BLOCK.sub("", target.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return anchor[1:] in {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_example_configurations_of_the_pages_are_accepted(page: Path, tmp_path: Path) -> None:
    for example in re.findall(
        r"^```toml\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    ):
        file = tmp_path / "runrecovery.toml"
        file.write_text(example, encoding="utf-8")

        assert reading.load(path=file, flags={}, environ={}).engines != {}


def test_every_page_is_in_the_index() -> None:
    index = _page("docs/README.md")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}

    assert [name for name in sorted(pages) if f"]({name})" not in index] == []


def test_pages_that_texts_name_exist() -> None:
    """Messages, comments, the contract and deploy/ name pages by their path."""
    texts = [
        path
        for folder in (
            "service",
            "client",
            "proto",
            "deploy",
            "tests",
            "bench",
            "demo",
            "docs",
            ".ci",
        )
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    ]
    texts += [ROOT / name for name in ("Makefile", "pyproject.toml", "runrecovery.example.toml")]
    named = {
        (str(text.relative_to(ROOT)), page, anchor)
        for text in [*texts, *PAGES]
        for page, anchor in NAMED_PAGE.findall(text.read_text(encoding="utf-8", errors="ignore"))
    }

    assert ("deploy/runrecovery.service", "docs/install.md", "#systemd") in named
    assert [
        place for place in sorted(named) if not _leads_somewhere(ROOT / place[1], place[2])
    ] == []


def test_sections_that_messages_name_exist() -> None:
    """Messages quote a heading between asterisks: `docs/operations.md, *A damaged database*`."""
    named = {
        found
        for source in SERVICE.rglob("*.py")
        for found in NAMED_SECTION.findall(source.read_text(encoding="utf-8"))
    }

    assert [
        (page, heading)
        for page, heading in sorted(named)
        if not re.search(rf"^#+ {re.escape(heading)}$", _page(page), re.MULTILINE)
    ] == []
    assert named != set()


def _named_files(text: str) -> Iterator[str]:
    """Yield the files and folders between backticks, and those of the tree at the top."""
    for word in re.findall(r"`([\w.][\w./-]*)`", CODE_BLOCK.sub("", text)):
        if word.endswith("/") or FILE_NAME.search(word):
            yield word
    for line in CODE_BLOCK.findall(text)[0].splitlines():
        yield from re.findall(r"(?:^| )([\w.][\w./-]*(?:/|\.py))(?= |$)", line)


def test_files_that_the_tour_names_exist() -> None:
    named = list(_named_files(_page("docs/development.md")))

    assert [
        name
        for name in named
        if not (ROOT / name).exists()
        and not (SERVICE / name).exists()
        and not (SERVICE / "engines" / name).exists()  # sessions/ in the tree
    ] == []
    assert {"execution/supervisor.py", "recovery/reconcile.py", "trust/"} <= set(named)


def test_tests_that_the_tour_names_exist() -> None:
    named = set(NAMED_TEST.findall((ROOT / "docs/development.md").read_text()))
    code = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))

    assert named
    assert {name for name in named if f"def {name}(" not in code} == set()


def test_picture_shows_what_the_matrix_decides() -> None:
    text = IMAGE.read_text(encoding="utf-8")
    drawn = re.findall(
        r'data-status="([A-Z_ ]+)" data-rule="(\w+)" data-becomes="(\w+)">(.*?)</g>',
        text,
        re.DOTALL,
    )

    assert {
        (frozenset(statuses.split()), rule, becomes) for statuses, rule, becomes, _ in drawn
    } == {(frozenset(rule.statuses), rule.name, rule.becomes) for rule in MATRIX}
    assert len(drawn) == len(MATRIX)
    assert [
        rule
        for _, rule, becomes, shown in drawn
        if f">{rule}<" not in shown or f">→ {becomes}<" not in shown
    ] == []


def test_picture_draws_the_rules_of_a_status_in_the_order_of_the_matrix() -> None:
    text = IMAGE.read_text(encoding="utf-8")
    tops = {
        rule: (int(left), int(top))
        for rule, left, top in re.findall(
            r'data-rule="(\w+)".*?<rect x="(\d+)" y="(\d+)"', text, re.DOTALL
        )
    }
    columns: dict[int, list[int]] = {}
    for rule in MATRIX:
        left, top = tops[rule.name]
        columns.setdefault(left, []).append(top)

    assert {left: sorted(found) for left, found in columns.items()} == columns


def test_engine_of_the_page_works(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", _page("docs/engines.md"), re.DOTALL)
    task = {"run_id": "r", "attempt": 1, "input": {"greeting": "Hi"}, "workspace": str(tmp_path)}
    reply = {"interaction_id": 1, "response": "Ada"}
    session = {"type": "jsonl", "value": "1"}

    asked = _turn(code, {"type": "start", **task})
    ended = _turn(code, {"type": "resume", **task, "session": session, "reply": reply})

    assert [message["type"] for message in asked] == ["session", "ask"]
    assert ended == [{"type": "result", "output": {"text": "Hi, Ada!"}}]


def _turn(code: str, message: dict[str, object]) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(message) + "\n",
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]
