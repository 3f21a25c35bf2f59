"""What `runrecovery check` says of TLS and callers, before a start would refuse them."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest
from runrecovery_service.config.settings import (
    CallerSettings,
    ClientAuth,
    RoleName,
    Settings,
    TlsSettings,
)
from runrecovery_service.domain.role import Role
from runrecovery_service.process.open_files import OpenFiles
from runrecovery_service.setup.access import access_problems, read_callers, tls_files
from runrecovery_service.setup.entrance import Entrance
from support.callers import token_of
from support.certificates import DAY, Authority, Pair


def tls(folder: Path, pair: Pair) -> TlsSettings:
    certificate, key = pair.write(folder, "server")
    return TlsSettings(certificate=certificate, key=key)


def caller(name: str, file: Path) -> CallerSettings:
    return CallerSettings(name=name, role=RoleName.CREATOR, token_file=file)


def test_nothing_is_wrong_without_tls_and_callers() -> None:
    assert access_problems(Settings()) == []
    assert tls_files(Settings()) is None


def test_a_certificate_that_clients_refuse_is_reported(tmp_path: Path) -> None:
    authority = Authority()
    good = Settings(tls=tls(tmp_path, authority.issue("h")))
    assert access_problems(good) == []

    tls(tmp_path, authority.issue("h", begins=-2 * DAY, ends=-DAY))
    assert access_problems(good) == [f"tls: {tmp_path}/server.pem: certificate has expired"]

    tls(tmp_path, Pair(certificate=authority.issue("h").certificate, key=authority.issue("h").key))
    assert access_problems(good) == [
        (
            f"tls: {tmp_path}/server.pem, {tmp_path}/server.key: the key does not belong to the"
            " certificate"
        )
    ]


def test_every_problem_is_reported_at_once_and_no_token_is_quoted(tmp_path: Path) -> None:
    weak, shared = tmp_path / "weak", tmp_path / "shared"
    weak.write_text("hunter2hunter2")
    shared.write_text(token_of("shared"))
    settings = Settings(
        tls=TlsSettings(
            certificate=tmp_path / "no.pem", key=tmp_path / "no.key", client_auth=ClientAuth.NONE
        ),
        callers=(caller("a", weak), caller("b", shared), caller("c", shared)),
    )

    assert access_problems(settings) == [
        (
            f"caller 'a': {weak}: a token must have at least 128 random bits, for example 32"
            " hexadecimal digits"
        ),
        "callers 'b' and 'c' have the same token",
        f"tls: {tmp_path}/no.pem: No such file or directory",
    ]


def test_a_token_in_the_place_of_a_token_file_is_not_quoted() -> None:
    token = token_of("ci")

    assert access_problems(Settings(callers=(caller("ci", Path(token)),))) == [
        "caller 'ci': token_file: No such file or directory"
    ]


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "a pipe"  # the blank: no token, which would not be quoted
    os.mkfifo(pipe)
    settings = Settings(tls=TlsSettings(certificate=pipe, key=pipe), callers=(caller("a", pipe),))

    assert access_problems(settings) == [
        f"caller 'a': {pipe}: not a regular file",
        f"tls: {pipe}: not a regular file",
    ]


def test_a_token_file_may_be_a_link_as_in_a_mounted_secret(tmp_path: Path) -> None:
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "token").write_text(token_of("ci"))
    link = tmp_path / "token"
    link.symlink_to("..data/token")

    (found,) = read_callers(Settings(callers=(caller("ci", link),)))

    assert found.tokens == (sha256(token_of("ci").encode()).digest(),)


@pytest.mark.parametrize(("all_", "callers", "probes"), [(6_000, 5_936, 64), (32, 16, 16)])
def test_probes_have_64_connections_and_never_more_than_callers(
    all_: int, callers: int, probes: int
) -> None:
    files = OpenFiles(limit=100_000, connections=all_, agents_soft=1024)

    entrance = Entrance.make(Settings(probe_listen="127.0.0.1:0"), files)

    assert (entrance.connections, entrance.probe_connections) == (callers, probes)


@pytest.mark.parametrize("content", ["{}\n{}\n", "{}\r\n\r\n{}", "\ufeff{}\n{}"])
def test_a_token_file_holds_two_tokens_however_its_lines_end(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(content.format(token_of("old"), token_of("new")), encoding="utf-8", newline="")

    (found,) = read_callers(Settings(callers=(caller("ci", file),)))

    assert found.tokens == tuple(
        sha256(token_of(name).encode()).digest() for name in ("old", "new")
    )
    assert (found.caller.name, found.caller.role) == ("ci", Role.CREATOR)
    assert token_of("old") not in repr(found)
