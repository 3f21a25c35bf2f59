"""Rules of the code that import-linter cannot check."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from runrecovery_service.config import reading
from runrecovery_service.config.reading import ConfigError
from runrecovery_service.config.settings import Settings
from support.syntax_trees import syntax_tree, syntax_trees

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "service" / "runrecovery_service"
SENDERS = {
    "kill", "killpg", "tgkill", "send_signal", "pidfd_send_signal", "terminate", "raise_signal",
    "pthread_kill", "sigqueue",
}  # fmt: skip
SENDS_SIGNALS = {
    "process/signals.py",  # the one function through which service and shim end processes
    "cli/demo/service_process.py",  # ends the service that it has started itself
}


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr


def names_called(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


def sources(*words: str) -> Iterator[tuple[str, ast.AST]]:
    for path, tree in syntax_trees(SERVICE, *words):
        yield str(path.relative_to(SERVICE)), tree


def parts(made: ast.ClassDef) -> list[str]:
    """Return the names of what a caller passes to make an object."""
    for node in made.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return [arg.arg for arg in (*node.args.args[1:], *node.args.kwonlyargs)]
    return [
        ast.unparse(node.target)
        for node in made.body
        if isinstance(node, ast.AnnAssign) and "init=False" not in ast.unparse(node)
    ]


def is_value(made: ast.ClassDef) -> bool:
    """Return whether an object only holds facts: it is frozen, and cannot reach clock or store."""
    frozen = any("frozen=True" in ast.unparse(decorator) for decorator in made.decorator_list)
    return frozen and {"clock", "storage", "db"}.isdisjoint(parts(made))


def test_an_object_that_is_no_value_is_made_of_at_most_eight_parts() -> None:
    assert [
        f"{name}: {node.name}"
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and len(parts(node)) > 8 and not is_value(node)
    ] == []


def test_no_file_has_more_than_500_lines_and_no_function_more_than_60() -> None:
    long = [
        str(path) for path in SERVICE.rglob("*.py") if path.read_text("utf-8").count("\n") > 500
    ]
    functions = [
        f"{name}: {node.name}"
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= 60
    ]

    assert (long, functions) == ([], [])


def test_signals_are_sent_in_one_place_only() -> None:
    senders = {name for name, tree in sources(*SENDERS) if SENDERS & set(calls(tree))}

    assert senders == SENDS_SIGNALS


def test_only_send_which_demands_markers_calls_the_one_function_that_sends_signals() -> None:
    tree = syntax_tree((SERVICE / "process" / "signals.py").read_text("utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    senders = [node.name for node in functions if SENDERS & set(calls(node))]
    callers = [node.name for node in functions if "_send" in set(names_called(node))]

    assert (senders, callers) == (["_send"], ["send"])


def test_no_other_code_sends_signals_by_another_way() -> None:
    words = ("pidfd_send_signal", "killpg", "cgroup.kill", "signals._send", "import _send")
    named = {
        (str(path.relative_to(SERVICE)), word)
        for path in SERVICE.rglob("*.py")
        for word in words
        if word in path.read_text("utf-8")
    }

    # That the file of the cgroup exists shows version 2. The file is never written.
    assert named == {
        ("process/signals.py", "pidfd_send_signal"), ("process/cgroup.py", "cgroup.kill")
    }  # fmt: skip


def test_runs_are_updated_only_in_the_files_that_compare_and_set() -> None:
    writers = {
        name
        for name, tree in sources("UPDATE run ")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.lstrip().startswith("UPDATE run ")
    }

    # storage/passed_deadlines.py updates deadlines only; it ends runs through storage/runs.py.
    # storage/interruptions.py and storage/found_ends.py add to the runs of a batch that
    # storage/recovery_apply.py decides.
    # storage/stale_bindings.py clears the sessions of ended runs.
    # storage/work_stealing.py and storage/hand_over.py change the owner of runs without a process.
    # storage/usage.py adds to counters, which are no part of a run's state, and names the epoch.
    assert writers == {
        "storage/runs.py", "storage/recovery_apply.py", "storage/reopening.py",
        "storage/passed_deadlines.py", "storage/session_checks.py", "storage/interruptions.py",
        "storage/usage.py", "storage/found_ends.py", "storage/stale_bindings.py",
        "storage/work_stealing.py", "storage/hand_over.py",
    }  # fmt: skip


def patterns(tree: ast.AST) -> Iterator[str]:
    """Yield the string constants in the arguments of `re.compile(…)` and its siblings."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "re"
        ):
            for inner in (inner for argument in node.args for inner in ast.walk(argument)):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield inner.value


def is_possessive(pattern: str) -> bool:
    """Return whether a pattern has a possessive quantifier or an atomic group."""
    without_literals = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)
    return re.search(r"[*+?}]\+|\(\?>", without_literals) is not None


def test_a_possessive_pattern_is_recognised() -> None:
    found = [is_possessive(text) for text in ("a++", "[+]*+", "a?+", "a{1,2}+", "(?>a)")]
    plain = [is_possessive(text) for text in (r"\++", "[*+]+", "a+", r"\(\?>", "(?:a+)+")]

    assert (found, plain) == ([True] * 5, [False] * 5)


def test_no_pattern_is_possessive() -> None:
    # Debian 12's Python, 3.11.2, matches such patterns wrongly.
    found = {
        str(path.relative_to(ROOT))
        for folder in ("service", "client", "tests", "bench", "demo")
        for path, tree in syntax_trees(ROOT / folder, "import re\n")
        if any(map(is_possessive, patterns(tree)))
    }

    assert found == set()


KUBERNETES = [path.name for path in sorted((ROOT / "deploy").glob("kubernetes*.yaml"))]


def test_the_manifests_of_kubernetes_are_these() -> None:
    assert KUBERNETES == ["kubernetes-replicas.yaml", "kubernetes-shared.yaml", "kubernetes.yaml"]


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_kubernetes_manifest_gives_agents_no_token_and_strangers_no_probe_port(name: str) -> None:
    parts = (ROOT / "deploy" / name).read_text("utf-8").split("\n---\n")
    (policy,) = (part for part in parts if "kind: NetworkPolicy" in part)
    (text,) = (part.partition("runrecovery.toml: |\n")[2] for part in parts if ".toml: |" in part)

    callers = tomllib.loads(dedent(text))["callers"]

    assert [sorted(caller) for caller in callers] == [["name", "role", "token_sha256"]]
    assert re.findall(r"\bport: (\d+)", policy) == ["50051", "9464"]


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_configuration_of_a_kubernetes_manifest_is_accepted_once_it_has_a_digest(
    tmp_path: Path, name: str
) -> None:
    manifest = (ROOT / "deploy" / name).read_text("utf-8")
    text = dedent(manifest.partition("runrecovery.toml: |\n")[2].partition("\n---\n")[0])
    file = tmp_path / "runrecovery.toml"

    def load() -> Settings:
        secret = {"RUNRECOVERY_DATABASE": "postgresql://db/runrecovery"}
        return reading.load(path=file, flags={}, environ=secret if "DATABASE" in manifest else {})

    file.write_text(text)
    with pytest.raises(ConfigError, match="must be the SHA-256 of the token"):
        load()
    file.write_text(text.replace("SHA-256 OF THE TOKEN", "a" * 64))
    settings = load()

    ports = re.findall(r"name: (probe|metrics), containerPort: (\d+)", manifest)
    assert [settings.probe_listen, settings.metrics_listen] == [f"0.0.0.0:{n}" for _, n in ports]


def test_every_deployment_bounds_the_arenas_of_glibc() -> None:
    # docs/configure.md, Size the machine. kubernetes.yaml runs the image of the Containerfile.
    found = {
        name: re.findall(r"\bMALLOC_ARENA_MAX=\d+", (ROOT / "deploy" / name).read_text("utf-8"))
        for name in ("runrecovery.service", "Containerfile")
    }

    assert found == {
        "runrecovery.service": ["MALLOC_ARENA_MAX=2"],
        "Containerfile": ["MALLOC_ARENA_MAX=2"],
    }


def test_migrations_are_numbered_without_gaps_and_repetitions() -> None:
    names = sorted(file.name for file in (SERVICE / "storage" / "migrations").glob("[0-9]*.py"))

    assert [name[:4] for name in names] == [f"{number:04}" for number in range(1, len(names) + 1)]
