"""Each launch has a cgroup of its own, on a real cgroup v2 where this user may create one."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from support.engines import GOOD_ENGINES, script
from support.service import Home
from support.waiting import until

NewHome = Callable[..., Home]

TELLS: Final = """
import json, sys
sys.stdin.readline()
own = open("/proc/self/cgroup").read().split("0::")[1].strip()
print(json.dumps({"type": "result", "output": {"cgroup": own}}), flush=True)
"""
# Nothing but its cgroup tells whose this one is: not even the watermark, which it lowers.
FADES: Final = """
import os, resource, sys, time
sys.stdin.readline()
own = open("/proc/self/cgroup").read().split("0::")[1].strip()
for folder in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
    if os.path.isdir(folder + own):
        os.mkdir(folder + own + "/below")
        inner = folder + own + "/below/cgroup.procs"
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for stream in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        with open(inner, "w") as procs:
            procs.write("0")
        resource.setrlimit(10, (7, 7))
        os.execve("/bin/sleep", ["sleep", "600"], {})
    os._exit(0)
os.wait()
print('{"type": "progress", "message": "faded"}', flush=True)
time.sleep(600)
"""


@pytest.fixture
def parent() -> Iterator[Path]:
    """Return a cgroup path for the service, which does not exist yet."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    places = [Path(words[1]) for words in mounts if words[2] == "cgroup2"]
    path = (places[0] if places else Path("/nowhere")) / f"runrecovery-{secrets.token_hex(4)}"
    try:
        path.mkdir()
        path.rmdir()
    except OSError:
        pytest.skip("this user may make no cgroup of version 2")
    yield path
    for folder in sorted(path.rglob("*/"), reverse=True):
        folder.rmdir()
    path.rmdir()


def cgroups_in(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()]


def processes_in(parent: Path) -> list[str]:
    return [pid for procs in parent.rglob("cgroup.procs") for pid in procs.read_text().split()]


def test_a_launch_has_a_cgroup_of_its_own_until_it_is_over(new_home: NewHome, parent: Path) -> None:
    home = new_home(engines={**GOOD_ENGINES, "tells": script(TELLS)}, cgroup_parent=str(parent))
    _, api = home.start()
    api.create("tells", run_id="tells")

    told = api.until_ended("tells").output["cgroup"]

    assert told == home.rows("SELECT cgroup FROM process_lease")[0][0]
    assert Path(str(told)).parent == Path("/") / parent.name
    assert cgroups_in(parent) == []


def test_a_process_that_removed_every_other_marker_is_found_by_its_cgroup(
    new_home: NewHome, parent: Path
) -> None:
    home = new_home(engines={**GOOD_ENGINES, "fades": script(FADES)}, cgroup_parent=str(parent))
    service, api = home.start()
    api.create("fades", run_id="fades")
    until(lambda: len(processes_in(parent)) == 2, "both are in it")

    home.kill_with_shims(service)
    _, api = home.start()

    assert processes_in(parent) == []
    assert cgroups_in(parent) == []
    assert api.status().reconciliation.orphans.refused == 0


def test_a_folder_that_is_no_cgroup_is_a_configuration_error(
    new_home: NewHome, tmp_path: Path
) -> None:
    home = new_home(cgroup_parent=str(tmp_path / "none"))
    service = home.spawn()

    assert service.exit_code() == 2
    assert "cgroup_parent" in service.text
    assert not (tmp_path / "none").exists()
