"""Programs for test_writers.py: edits of the service, and a CLI that rewrites its file.

editing.py add FILE KIND FOLDER...     add these; print "decided" and wait for a line in between
editing.py toggle FILE KIND FOLDER     add and remove forever; print a line after each edit
editing.py dying FILE KIND FOLDER      for each line N read: in a child, add, and die by SIGKILL
                                       before the N-th system event; print the child's exit code
editing.py cli FILE                    for each line read: count up, rewrite the file, print
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from runrecovery_service.trust import config_files, files
from runrecovery_service.trust.entry import Added, Edit, Removal
from runrecovery_service.trust.errors import TrustFileBusy


def add_entry(path: Path, kind: str, folder: str, record: Callable[[Edit], object]) -> Edit:
    editor = config_files.editor_of(config_files.AgentCli(kind))
    return files.edit(path, lambda text: editor.add(text, folder), record=record)


def remove_entry(path: Path, kind: str, folder: str, added: Added) -> Removal:
    editor = config_files.editor_of(config_files.AgentCli(kind))
    return files.edit(path, lambda text: editor.remove(text, folder, added))


def add(path: Path, kind: str, *folders: str) -> None:
    for folder in folders:
        recorded: list[Edit] = []

        def record(edit: Edit, recorded: list[Edit] = recorded) -> None:
            if not recorded:
                print("decided", flush=True)
                sys.stdin.readline()
            recorded.append(edit)

        add_entry(path, kind, folder, record)


def toggle(path: Path, kind: str, folder: str) -> None:
    while True:
        with suppress(TrustFileBusy):  # a CLI that writes all the time
            edit = add_entry(path, kind, folder, lambda _: None)
            print("added", flush=True)
            remove_entry(path, kind, folder, edit.added)
            print("removed", flush=True)


def dying(path: Path, kind: str, folder: str) -> None:
    # Import all modules now: an import is a system event too.
    config_files.editor_of(config_files.AgentCli(kind)).add(b"", folder)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            add_and_die(path, kind, folder, int(line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def add_and_die(path: Path, kind: str, folder: str, last: int) -> None:
    events = itertools.count(1)
    fsync = os.fsync

    def die_at(event: str, _: tuple[object, ...]) -> None:
        watched = event in {"open", "fsync"} or event.startswith(("os.", "fcntl."))
        if watched and next(events) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(descriptor: int) -> None:
        sys.audit("fsync")
        fsync(descriptor)

    setattr(os, "fsync", audited)  # noqa: B010 - its type is another one
    sys.addaudithook(die_at)
    add_entry(path, kind, folder, lambda _: None)


def cli(path: Path) -> None:
    for _ in sys.stdin:
        document = json.loads(path.read_bytes())
        document["count"] = document.get("count", 0) + 1
        new = path.with_name(f"{path.name}.tmp.cli")
        new.write_text(json.dumps(document, indent=2))
        new.replace(path)
        print("written", flush=True)


if __name__ == "__main__":
    _, what, where, *rest = sys.argv
    match what:
        case "add":
            add(Path(where), *rest)
        case "toggle":
            toggle(Path(where), *rest)
        case "dying":
            dying(Path(where), *rest)
        case "cli":
            cli(Path(where))
