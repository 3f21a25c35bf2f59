"""Agents that misbehave; the environment and limits of agents; their output and leftovers."""

from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, status_word
from support.engines import GOOD_ENGINES, EngineSpec, agent, script
from support.processes import environment_of, open_files
from support.service import Home
from support.waiting import until

QUESTION: Final = {"kind": "open_text", "prompt": "What next?"}
FOREVER_S: Final = 60

PROTOCOL_BREAKERS: Final = (
    "garbage_line",
    "long_line",
    "endless_line",
    "closes_stdout",
    "asks_without_session",
    "asks_badly",
)
REPORT_ENVIRONMENT: Final = """
import json, os, sys
sys.stdin.readline()
links = {fd: os.readlink("/proc/self/fd/" + fd) for fd in os.listdir("/proc/self/fd")
         if os.path.exists("/proc/self/fd/" + fd)}
output = {"env": dict(os.environ), "fds": links, "cwd": os.getcwd(),
          "session": os.getsid(0) == os.getpid(), "umask": os.umask(0)}
print(json.dumps({"type": "result", "output": output}), flush=True)
"""
REPORT_LIMITS: Final = """
import json, os, resource, sys
sys.stdin.readline()
output = {name: list(resource.getrlimit(getattr(resource, "RLIMIT_" + name)))
          for name in ("DATA", "NOFILE", "NPROC")}
print(json.dumps({"type": "result", "output": output | {"nice": os.nice(0)}}), flush=True)
"""
SPEAKS_IN_PARTS: Final = """
import json, os, sys, time
sys.stdin.readline()
go = os.path.join(os.getcwd(), "go")
for number in range(3):
    while not os.path.exists(go + str(number)):
        time.sleep(0.005)
    print(json.dumps({"type": "progress", "message": "part %d" % number}), flush=True)
print(json.dumps({"type": "result", "output": {}}), flush=True)
"""
FLOODS: Final = """
import json, sys
sys.stdin.readline()
for number in range(2000):
    print(json.dumps({"type": "progress", "message": "%06d" % number + "x" * 100}))
print(json.dumps({"type": "result", "output": {"done": True}}), flush=True)
"""
STUBBORN_TREE: Final = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.readline()
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
for new_session in (False, True):
    subprocess.Popen([sys.executable, "-I", "-S", "-c", code], start_new_session=new_session)
time.sleep(60)
"""


def ended(api: Api, engine: str) -> run_pb2.Run:
    return api.until_ended(api.create(engine, {}).run_id)


def error_of(run: run_pb2.Run) -> str:
    assert status_word(run) == "FAILED", run
    return run.error.code


def joined(pieces: list[pb.StreamOutputResponse]) -> bytes:
    """Join the pieces; check that their offsets leave no gap."""
    data = b""
    for piece in pieces:
        assert piece.offset == pieces[0].offset + len(data)
        data += piece.data
    return data


# -- how an engine can fail --------------------------------------------------------------------


def test_a_missing_command_fails_the_launch(new_home: Callable[..., Home]) -> None:
    missing = agent("exits_3")
    there_is_none = type(missing)(command=("/nonexistent/agent",))
    home = new_home(engines={"missing": there_is_none})
    _, api = home.start()

    run = ended(api, "missing")

    assert error_of(run) == "LAUNCH_FAILED"
    assert "/nonexistent/agent" in run.error.message
    assert (run.attempt, run.holds_slot) == (1, False)
    assert api.health_of() == "SERVING"


def test_the_input_is_ready_when_the_agent_starts(new_home: Callable[..., Home]) -> None:
    look = 'read -t 0 && there=true || there=false; read -r _; echo "'
    told = look + '{\\"type\\":\\"result\\",\\"output\\":{\\"there\\":$there}}"'
    home = new_home(engines={"hasty": EngineSpec(command=("/bin/bash", "-c", told))})
    _, api = home.start()

    ended = [api.until_ended(api.create("hasty", {}).run_id) for _ in range(5)]

    assert [MessageToDict(run.output) for run in ended] == [{"there": True}] * 5


def test_a_bad_exit_fails_the_run_with_the_end_of_its_stderr(api: Api) -> None:
    run = ended(api, "exits_3")

    assert error_of(run) == "ENGINE_FAILED"
    assert "exited with 3" in run.error.message
    assert "the model refused to answer" in run.error.message


def test_a_good_exit_without_a_result_fails_the_run(api: Api) -> None:
    run = ended(api, "exits_silently")

    assert error_of(run) == "ENGINE_FAILED"


@pytest.mark.parametrize("engine", PROTOCOL_BREAKERS)
def test_an_agent_that_breaks_the_protocol_is_killed_and_its_run_fails(
    home: Home, api: Api, engine: str
) -> None:
    run = ended(api, engine)

    assert error_of(run) == "ENGINE_PROTOCOL_ERROR"
    assert home.agents_of(run.run_id) == []
    assert not run.holds_slot


@pytest.mark.parametrize("engine", ["unknown_types", "result_then_hangs", "floods_stderr"])
def test_a_result_counts_despite_harmless_oddities(home: Home, api: Api, engine: str) -> None:
    run = ended(api, engine)

    assert (status_word(run), MessageToDict(run.output)) == ("SUCCEEDED", {"done": True})
    assert home.agents_of(run.run_id) == []


def test_processes_that_an_agent_leaves_behind_are_killed(home: Home, api: Api) -> None:
    run = ended(api, "leaves_children")

    left = MessageToDict(run.output)
    assert status_word(run) == "SUCCEEDED"
    assert {int(left["scrubbed"]), int(left["moved"])}.isdisjoint(home.agents())


def test_a_cancel_ends_the_whole_tree_of_an_engine_that_ignores_sigterm(
    new_home: Callable[..., Home],
) -> None:
    home = new_home(engines={"tree": script(STUBBORN_TREE)}, cancel_grace_s=0.3)
    _, api = home.start()
    run = api.create("tree", {})
    until(lambda: len(home.agents_of(run.run_id)) == 3, "the tree stands")

    accepted = api.cancel(run.run_id)
    canceled = api.until_ended(run.run_id)

    assert accepted.cancel_requested
    assert status_word(canceled) == "CANCELED"
    assert (canceled.ended_at.ToNanoseconds() - accepted.updated_at.ToNanoseconds()) / 1e9 < 5
    assert home.agents() == []


def test_a_sticky_process_that_dies_in_its_wait_fails_the_run(home: Home, api: Api) -> None:
    run = api.create("sticky", {"questions": [QUESTION]})
    api.until_status(run.run_id, "WAITING_USER")
    (pid,) = home.agents_of(run.run_id)
    os.kill(pid, 9)

    run = api.until_ended(run.run_id)

    assert error_of(run) == "INTERACTION_PROCESS_LOST"
    assert not run.HasField("pending_interaction")


def test_a_sticky_process_gets_every_answer_once(api: Api) -> None:
    run = api.create("sticky", {"questions": [QUESTION] * 3})
    for number in (1, 2, 3):

        def asked(number: int = number) -> bool:
            return api.get(run.run_id).pending_interaction.interaction_id == number

        until(asked, f"question {number}")
        api.reply(run.run_id, number, f"answer {number}")
        api.reply(run.run_id, number, f"answer {number}")

    output = MessageToDict(api.until_ended(run.run_id).output)
    assert output == {"answers": ["answer 1", "answer 2", "answer 3"]}


# -- what an engine gets -----------------------------------------------------------------------


def test_an_engine_gets_the_variables_that_are_allowed_and_no_descriptor_of_the_service(
    new_home: Callable[..., Home],
) -> None:
    tells = script(REPORT_ENVIRONMENT, env_allow=["PATH", "WANTED"])
    env = {"WANTED": "yes", "AWS_SECRET_ACCESS_KEY": "canary", "RUNRECOVERY_LEASE": "0.stranger"}
    home = new_home(engines={"tells": tells}, env=env)
    _, api = home.start()

    run = ended(api, "tells")

    told = MessageToDict(run.output)
    names = {"PATH", "WANTED", "RUNRECOVERY_LEASE", "RUNRECOVERY_RUN_ID", "RUNRECOVERY_ATTEMPT"}
    # Python itself may add one for its own locale.
    assert set(told["env"]) - {"LC_CTYPE"} == names
    assert told["env"]["RUNRECOVERY_RUN_ID"] == run.run_id
    assert told["env"]["RUNRECOVERY_LEASE"] != "0.stranger"
    assert set(told["fds"]) == {"0", "1", "2"}
    assert all(link.startswith("pipe:") for link in told["fds"].values())
    assert told["session"]
    assert told["cwd"].startswith(str(home.data / "runs"))


def test_a_living_agent_holds_no_file_or_port_of_the_service(home: Home, api: Api) -> None:
    runs = [api.create("sticky", {"questions": [QUESTION]}) for _ in range(2)]
    for run in runs:
        api.until_status(run.run_id, "WAITING_USER")
    (first,), (second,) = (home.agents_of(run.run_id) for run in runs)

    holds = {pid: open_files(pid) for pid in (first, second)}
    assert not any(link.startswith("socket:") for links in holds.values() for link in links)
    assert not any(str(home.database) in link for links in holds.values() for link in links)
    assert holds[first].isdisjoint(holds[second])
    for run in runs:
        api.cancel(run.run_id)


def mode_of(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


def test_only_the_owner_can_read_the_data_directory(new_home: Callable[..., Home]) -> None:
    home = new_home(engines={**GOOD_ENGINES, "exits_3": agent("exits_3")})
    _, api = home.start()
    run = api.until_ended(api.create("resumable", {}).run_id)
    ended(api, "exits_3")

    kept = [path for path in home.data.rglob("*") if "workspace" not in path.parts[:-1]]
    folders = {path for path in kept if path.is_dir()} | {home.data}
    files = {path for path in kept if path.is_file()}
    assert {mode_of(path) for path in folders} == {"0o700"}
    assert {path.name: mode_of(path) for path in files} == {path.name: "0o600" for path in files}
    assert {"workspace", "stdout.log", "stderr.log"} <= {path.name for path in kept}
    assert status_word(run) == "SUCCEEDED"


def test_the_folders_of_runs_lie_below_runs_dir_and_are_of_its_owner_only(
    new_home: Callable[..., Home], tmp_path: Path
) -> None:
    place = tmp_path / "volume" / "runs"
    home = new_home(runs_dir=str(place))
    _, api = home.start()
    run = api.until_ended(api.create("resumable", {}).run_id)

    names = {str(path.relative_to(place)) for path in place.rglob("*")}
    assert {".store", "1/1/workspace", "1/1/stdout.log"} <= names
    assert mode_of(place) == "0o700"
    assert not (home.data / "runs").exists()
    assert status_word(run) == "SUCCEEDED"


def test_only_the_owner_can_read_the_cookie_of_a_launch(home: Home, api: Api) -> None:
    run = api.create("sticky", {"questions": [QUESTION]})
    api.until_status(run.run_id, "WAITING_USER")
    (pid,) = home.agents_of(run.run_id)
    token = environment_of(pid)["RUNRECOVERY_LEASE"]

    assert token
    assert token.partition(".")[2] not in Path(f"/proc/{pid}/cmdline").read_text()
    assert token.partition(".")[2] not in home.logs()
    api.cancel(run.run_id)


# -- its output --------------------------------------------------------------------------------


def test_output_can_be_read_from_any_offset(api: Api) -> None:
    run = api.until_ended(api.create("resumable", {"result": {"text": "x" * 200_000}}).run_id)

    whole = joined(api.output(run.run_id))

    assert json.loads(whole.splitlines()[-1])["output"]["text"] == "x" * 200_000
    assert max(len(piece.data) for piece in api.output(run.run_id)) <= 65_536
    for offset in (1, 65_535, 65_536, 65_537, len(whole) - 1):
        assert joined(api.output(run.run_id, offset=offset)) == whole[offset:]
    assert api.output(run.run_id, offset=len(whole)) == []


def test_a_follower_gets_every_byte_and_then_the_end(new_home: Callable[..., Home]) -> None:
    home = new_home(engines={"speaks": script(SPEAKS_IN_PARTS)})
    _, api = home.start()
    run = api.create("speaks", {})
    followed = api.runs.StreamOutput(
        pb.StreamOutputRequest(run_id=run.run_id, follow=True), timeout=FOREVER_S
    )
    (workspace,) = until(lambda: list(home.data.glob("runs/*/1/workspace")), "the run has started")
    got = b""
    for number in range(3):
        (workspace / f"go{number}").touch()
        while f"part {number}".encode() not in got:
            got += next(followed).data

    got += b"".join(piece.data for piece in followed)

    assert status_word(api.get(run.run_id)) == "SUCCEEDED"
    assert got == joined(api.output(run.run_id))
    assert got.endswith(b'"output": {}}\n')


def test_a_follower_of_a_queued_run_waits_for_its_output(new_home: Callable[..., Home]) -> None:
    home = new_home(max_concurrent=1)
    _, api = home.start()
    first = api.create("resumable", {"hold": True})
    second = api.create("resumable", {})
    followed = api.runs.StreamOutput(
        pb.StreamOutputRequest(run_id=second.run_id, follow=True), timeout=FOREVER_S
    )

    api.cancel(first.run_id)
    got = b"".join(piece.data for piece in followed)

    assert b'"result"' in got


def test_stderr_is_a_channel_of_its_own(api: Api) -> None:
    run = ended(api, "exits_3")

    stderr = joined(api.output(run.run_id, channel=pb.OUTPUT_CHANNEL_STDERR))

    assert stderr == b"the model refused to answer\n"
    assert api.output(run.run_id) == []


def test_output_above_the_limit_is_truncated_and_marked(new_home: Callable[..., Home]) -> None:
    home = new_home(engines={"floods": script(FLOODS)}, max_output_bytes=65_536)
    _, api = home.start()
    run = ended(api, "floods")

    pieces = api.output(run.run_id)
    followed = api.output(run.run_id, follow=True)

    assert status_word(run) == "SUCCEEDED"
    assert len(joined(pieces)) == 65_536
    assert [piece.truncated for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert followed == pieces


def test_output_with_nul_or_odd_bytes_is_kept_byte_for_byte(
    new_home: Callable[..., Home],
) -> None:
    odd = b"\x00\xff\xfe odd \xf0\x9f\n"
    text = f"import os, sys; sys.stdin.readline(); os.write(2, {odd!r}); sys.exit(7)"
    home = new_home(engines={"odd": script(text)})
    _, api = home.start()

    run = ended(api, "odd")

    assert error_of(run) == "ENGINE_FAILED"
    assert "\0" not in run.error.message
    assert joined(api.output(run.run_id, channel=pb.OUTPUT_CHANNEL_STDERR)) == odd


def test_the_configured_limits_reach_the_agent(
    new_home: Callable[..., Home],
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    processes = 50_000 if hard == resource.RLIM_INFINITY else hard - 1
    bounded = script(
        REPORT_LIMITS, nice=3, max_memory="512M", max_open_files=77, max_processes=processes
    )
    home = new_home(engines={"bounded": bounded})
    _, api = home.start()

    told = MessageToDict(ended(api, "bounded").output)

    assert told == {
        "DATA": [536_870_912] * 2,
        "NOFILE": [77] * 2,
        "NPROC": [processes] * 2,
        "nice": min(19, os.nice(0) + 3),
    }


def test_the_lock_files_name_the_service_that_holds_them(new_home: Callable[..., Home]) -> None:
    home = new_home(engines=GOOD_ENGINES)
    service, _ = home.start()

    texts = [(home.data / name).read_text() for name in ("lock", "runrecovery.db.lock")]

    assert [text.partition(", on ")[0] for text in texts] == [
        f"instance 'default', pid {service.pid}"
    ] * 2
