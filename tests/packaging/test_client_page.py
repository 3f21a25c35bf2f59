"""The code of docs/clients.md, taken from the page and run against a service.

What a machine lacks is skipped by name: the compilers, Debian's libraries for Go and Java, and the
npm packages, which `make packaging` installs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.rpc import error_details_pb2
from support.engines import REPOSITORY, RESUMABLE
from support.service import Home

PAGE = REPOSITORY / "docs" / "clients.md"
PROTO = REPOSITORY / "proto"
NODE_MODULES = Path(os.environ.get("NODE_CLIENT", REPOSITORY / ".node-client")) / "node_modules"
GO_SOURCES = Path("/usr/share/gocode")
JARS = Path("/usr/share/java")
WANTED_JARS = re.compile(
    r"(grpc-[a-z-]+|protobuf(-util)?|guava|gson|netty.*|perfmark-api|failureaccess|jsr305"
    r"|geronimo-annotation-1\.3-spec)\.jar"
)
JARS_NEEDED = ("grpc-netty", "protobuf-util", "netty-all", "gson", "geronimo-annotation-1.3-spec")
PATIENCE_S = 300.0
TOLD = ["RUN_EVENT_KIND_CREATED", "RUN_STATUS_SUCCEEDED"]

GO_MAIN = """
package main
import (
  "context"
  "fmt"
  "log"
  "time"
  "github.com/google/uuid"
  "google.golang.org/genproto/googleapis/rpc/errdetails"
  "google.golang.org/grpc"
  "google.golang.org/grpc/status"
  "google.golang.org/protobuf/types/known/structpb"
  v1 "example.com/app/runrecovery/v1"
)
%s
func main() {
  ctx, cancel := context.WithTimeout(context.Background(), 10 * time.Second)
  defer cancel()
  %s
  _, err = runs.GetRun(ctx, &v1.GetRunRequest{RunId: "no-such-run"})
  for _, detail := range status.Convert(err).Details() {
    if info, ok := detail.(*errdetails.ErrorInfo); ok {
      fmt.Println("reason", info.Reason)
    }
  }
}
"""

JAVA_MAIN = """
import com.google.protobuf.Any;
import com.google.protobuf.Struct;
import com.google.protobuf.util.JsonFormat;
import com.google.rpc.ErrorInfo;
import io.grpc.ManagedChannelBuilder;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.util.*;
import java.util.concurrent.TimeUnit;
import runrecovery.v1.*;
public class Main {
  public static void main(String[] words) throws Exception {
    %s
    try {
      runs.getRun(GetRunRequest.newBuilder().setRunId("no-such-run").build());
    } catch (StatusRuntimeException error) {
      for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
        if (detail.is(ErrorInfo.class)) {
          System.out.println("reason " + detail.unpack(ErrorInfo.class).getReason());
        }
      }
    }
    channel.shutdownNow();
  }
}
"""

NODE_MORE = """
const value2 = { a: [1, "b", true, null], c: { d: "e" } };
runs.createRun({ engine: "demo", input: struct(value2) }, (error, answer) => {
  if (error) throw error;
  console.log("given", JSON.stringify(object(answer.run.input)));
});
runs.getRun({ runId: "no-such-run" }, (error) => {
  console.log("reason", details(error).find(({ type }) => type === "ErrorInfo").reason);
});
"""


def blocks(language: str) -> list[str]:
    """Return the code of a language on the page, in order."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )


def demand(*programs: str) -> None:
    """Skip the test, naming what this machine lacks."""
    lacking = [name for name in programs if shutil.which(name) is None]
    if lacking:
        pytest.skip(f"not on this machine: {', '.join(lacking)}")


def demand_files(*paths: Path) -> None:
    """Skip the test, naming the files that this machine lacks."""
    lacking = [str(path) for path in paths if not path.exists()]
    if lacking:
        pytest.skip(f"not on this machine: {', '.join(lacking)}")


def run(words: list[str], cwd: Path, **env: str) -> str:
    """Run a program that must succeed, and return what it printed."""
    ended = subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=PATIENCE_S,
        env={**os.environ, "no_proxy": "localhost,127.0.0.1", **env},
    )
    assert ended.returncode == 0, f"{words[0]}: {ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of a service with the engine `demo`."""
    path = tmp_path / "home"
    path.mkdir()
    with Home(path, engines={"demo": RESUMABLE}) as home:
        service, _ = home.start()
        yield service.address


@pytest.fixture
def at_service(address: str) -> Callable[[str], str]:
    """Puts the service's address in the place of the page's."""

    def at(code: str) -> str:
        assert code.count("127.0.0.1:50051") == 1
        return code.replace("127.0.0.1:50051", address)

    return at


def test_the_code_for_node_runs(at_service: Callable[[str], str], tmp_path: Path) -> None:
    demand("node")
    demand_files(NODE_MODULES)
    create, structs, errors = blocks("js")
    (tmp_path / "proto").symlink_to(PROTO)
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    code = f"{at_service(create)}\n{structs}\n{errors}\n{NODE_MORE}"
    (tmp_path / "main.js").write_text(code, "utf-8")

    printed = run(["node", "main.js"], tmp_path)

    assert all(word in printed for word in TOLD)
    (given,) = re.findall(r"^given (.*)$", printed, re.MULTILINE)
    assert json.loads(given) == {"a": [1, "b", True, None], "c": {"d": "e"}}
    assert "reason RUN_NOT_FOUND" in printed


def test_the_code_for_go_runs(at_service: Callable[[str], str], tmp_path: Path) -> None:
    demand("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc")
    demand_files(GO_SOURCES / "src" / "google.golang.org" / "grpc")
    retries, _, client = blocks("go")[0].partition("\n\n")
    # Debian's grpc 1.33 has no NewClient yet.
    client = client.replace("grpc.NewClient(", "grpc.Dial(")
    client = client.replace(
        "grpc.WithTransportCredentials(insecure.NewCredentials())", "grpc.WithInsecure()"
    )
    module = tmp_path / "src" / "example.com" / "app"
    module.mkdir(parents=True)
    (module / "proto").symlink_to(PROTO)
    (generate,) = re.findall(
        r"^```\n(M=.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    run(["bash", "-euc", generate], module)
    (module / "main.go").write_text(GO_MAIN % (retries, at_service(client)), "utf-8")
    go = {
        "GOPATH": f"{tmp_path}:{GO_SOURCES}",
        "GO111MODULE": "off",
        "GOFLAGS": "",
        "GOCACHE": str(tmp_path / "cache"),
    }
    run(["go", "build", "-o", "client", "."], module, **go)

    printed = run(["./client"], module, GRPC_GO_RETRY="on")

    assert all(word in printed for word in TOLD)
    assert "reason RUN_NOT_FOUND" in printed


def test_the_code_for_java_runs(at_service: Callable[[str], str], tmp_path: Path) -> None:
    demand("javac", "java", "protoc", "grpc_java_plugin")
    demand_files(*(JARS / f"{name}.jar" for name in JARS_NEEDED))
    (client,) = blocks("java")
    (tmp_path / "Main.java").write_text(JAVA_MAIN % at_service(client), "utf-8")
    protos = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("runrecovery/v1/*.proto"))
    plugin = shutil.which("grpc_java_plugin")
    sources = tmp_path / "generated"
    sources.mkdir()
    # Debian has javax.annotation.Generated under another name (geronimo), and has no
    # proto-google-common-protos, which grpc-protobuf brings elsewhere.
    google = Path(error_details_pb2.__file__).parents[2]
    protos += [f"google/rpc/{name}.proto" for name in ("status", "error_details")]
    words = [f"--plugin=protoc-gen-grpc-java={plugin}", "-I", str(PROTO), "-I", str(google)]
    run(
        ["protoc", *words, f"--java_out={sources}", f"--grpc-java_out={sources}", *protos], tmp_path
    )
    jars = ":".join(str(jar) for jar in sorted(JARS.glob("*.jar")) if WANTED_JARS.match(jar.name))
    java = [str(path) for path in sources.rglob("*.java")]
    run(["javac", "-nowarn", "-cp", jars, "-d", "classes", "Main.java", *java], tmp_path)

    printed = run(["java", "-cp", f"classes:{jars}", "Main"], tmp_path)

    assert all(word in printed for word in TOLD)
    assert "reason RUN_NOT_FOUND" in printed
