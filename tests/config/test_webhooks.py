"""`[[webhooks]]`: what is read, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import TypeAlias

import pytest
from runrecovery_service import offline
from runrecovery_service.cli.exit_codes import ExitCode, of_class
from runrecovery_service.cli.local import START_EXIT_CODES
from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.start_errors import WebhooksRefused
from runrecovery_service.domain.webhook import WebhookEvent
from runrecovery_service.setup import webhooks as webhook_setup
from support.webhook_receiver import OTHER_SECRET, SECRET

Load: TypeAlias = Callable[..., Settings]
Problems: TypeAlias = Callable[..., tuple[str, ...]]


def table(**changes: str | None) -> str:
    """Return a table with keys that are changed, or left out, as they are written."""
    given: dict[str, str | None] = {
        "name": '"chat"',
        "url": '"https://chat.example/hook?key=hidden"',
        "secret_file": '"secret"',
    }
    lines = [f"{key} = {value}" for key, value in (given | changes).items() if value is not None]
    return "\n".join(["[[webhooks]]", *lines, ""])


def test_a_webhook_has_documented_defaults_and_hides_its_url(load: Load) -> None:
    (webhook,) = load(table()).webhooks

    assert webhook.events == (
        WebhookEvent.WAITING_USER,
        WebhookEvent.ENDED,
        WebhookEvent.RECOVERED,
    )
    assert (webhook.allow_private, webhook.timeout_s, webhook.give_up_s) == ((), 15.0, 259_200.0)
    assert "hidden" not in repr(webhook)


@pytest.mark.parametrize(
    ("written", "networks"),
    [
        ("true", ["0.0.0.0/0", "::/0"]),
        ("false", []),
        ('["10.0.0.0/8", "::1"]', ["10.0.0.0/8", "::1/128"]),
    ],
)
def test_allow_private_is_all_none_or_a_list(load: Load, written: str, networks: list[str]) -> None:
    (webhook,) = load(table(allow_private=written)).webhooks

    assert webhook.allow_private == tuple(map(ip_network, networks))


URL_AT = "webhooks[0].url: "


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": None}, "webhooks[0].name: is missing"),
        ({"url": None}, URL_AT + "is missing"),
        ({"secret_file": None}, "webhooks[0].secret_file: is missing"),
        ({"url": '"ftp://x/"'}, URL_AT + "must begin with https:// or http://"),
        (
            {"url": '"https://me:hidden@x/"'},
            URL_AT + "must not hold a user or a password; deliveries are signed",
        ),
        ({"url": '"https://x/#hidden"'}, URL_AT + "must not have a fragment (#…)"),
        (
            {"url": '"https://x:0/"'},
            URL_AT + "must name a host, in ASCII, and a port above 0 if it names one",
        ),
        (
            {"url": '"https:///hidden"'},
            URL_AT + "must name a host, in ASCII, and a port above 0 if it names one",
        ),
        (
            {"url": '"https://x..y/"'},
            URL_AT + "must name a host, in ASCII, and a port above 0 if it names one",
        ),
        ({"url": '"https://x:99999/"'}, URL_AT + "must be a URL with a valid host and port"),
        ({"url": '"https://[::1/"'}, URL_AT + "must be a URL with a valid host and port"),
        (
            {"url": '"https://x/hidden\\r\\nHost: y"'},
            URL_AT + "must be a URL of at most 2048 visible ASCII characters",
        ),
        (
            {"url": '"https://ä/"'},
            URL_AT + "must be a URL of at most 2048 visible ASCII characters",
        ),
        ({"url": '"http://x/"'}, URL_AT + "needs https://, allow_private or insecure_http = true"),
        (
            {"url": '"http://x/"', "insecure_http": "true", "ca_file": '"ca"'},
            "webhooks[0].ca_file: has no effect with http://",
        ),
        ({"events": "[]"}, "webhooks[0].events: must not be empty"),
        (
            {"events": '["ENDED", "ended"]'},
            (
                'webhooks[0].events[1]: must be one of "WAITING_USER", "ENDED", "RECOVERED",'
                ' not "ended"'
            ),
        ),
        ({"engines": '["none"]'}, 'webhooks[0].engines: no engine "none" is configured'),
        (
            {"allow_private": '["10.0.0.1/8"]'},
            (
                'webhooks[0].allow_private[0]: must be an address, or a network like "10.0.0.0/8",'
                ' not "10.0.0.1/8"'
            ),
        ),
        (
            {"allow_private": '"10.0.0.1"'},
            "webhooks[0].allow_private: must be true, false, or a list of addresses and networks",
        ),
        ({"timeout_s": "0"}, "webhooks[0].timeout_s: must be from 0.1 to 300 seconds, not 0"),
        ({"more": "1"}, "webhooks[0].more: unknown key"),
    ],
)
def test_a_bad_webhook_is_refused_with_its_place_and_without_secrets(
    problems: Problems, tmp_path: Path, changes: dict[str, str | None], problem: str
) -> None:
    found = problems(table(**changes))

    assert found == (f"{tmp_path / 'runrecovery.toml'}: {problem}",)
    assert "hidden" not in found[0]


def test_names_are_unique_and_webhooks_are_few(problems: Problems, tmp_path: Path) -> None:
    place = f"{tmp_path / 'runrecovery.toml'}: webhooks: "

    assert problems(table() * 2) == (place + "two webhooks have the same name",)
    many = "".join(table(name=f'"w{number}"') for number in range(17))
    assert problems(many) == (place + "must be at most 16, not 17",)


def test_a_webhook_is_built_with_the_keys_of_its_secrets(load: Load, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"\n{SECRET}\n  {OTHER_SECRET}\n\n")

    (endpoint,) = webhook_setup.build_endpoints(load(table(secret_file=f'"{secret}"')))

    assert (endpoint.host, endpoint.port, endpoint.target) == (
        "chat.example", 443, "/hook?key=hidden",
    )  # fmt: skip
    assert [len(key) for key in endpoint.keys] == [24, 24]
    assert endpoint.origin == "https://chat.example"
    assert "hidden" not in repr(endpoint)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "{file}: No such file or directory"),
        ("", "{file}: must hold one secret, or 2, each on its own line"),
        (f"{SECRET}\n" * 3, "{file}: must hold one secret, or 2, each on its own line"),
        ("whsec_\n" + " " * 5000, "{file}: must hold one secret, or 2, each on its own line"),
        ("hidden", "{file}: a secret must be whsec_ and base64"),
        ("whsec_aGlkZGVu", "{file}: a secret must have 24 to 64 bytes, not 6"),
        ("\xff\xfe", "{file}: a secret must be whsec_ and base64"),
    ],
)
def test_a_bad_secret_file_refuses_the_start_and_is_not_quoted(
    load: Load, tmp_path: Path, content: str | None, problem: str
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    settings = load(table(secret_file=f'"{file}"'))

    with pytest.raises(WebhooksRefused) as refused:
        webhook_setup.build_endpoints(settings)

    expected = (f"webhook 'chat': {problem.format(file=file)}",)
    assert refused.value.problems == webhook_setup.webhook_problems(settings) == expected


def test_a_secret_in_place_of_its_file_is_not_quoted(load: Load) -> None:
    settings = load(table(secret_file=f'"{SECRET}"'))

    assert webhook_setup.webhook_problems(settings) == (
        "webhook 'chat': secret_file: No such file or directory",
    )


@pytest.mark.parametrize("text", ["no certificate", "", "\n"])
def test_a_ca_file_without_certificates_refuses_the_start(
    load: Load, tmp_path: Path, text: str
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "ca").write_text(text)
    settings = load(table(secret_file=f'"{tmp_path}/secret"', ca_file=f'"{tmp_path}/ca"'))

    assert webhook_setup.webhook_problems(settings) == (
        f"webhook 'chat': {tmp_path}/ca: holds no certificates in PEM",
    )


def test_without_the_extra_a_start_says_what_to_install(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    monkeypatch.setattr(webhook_setup, "find_spec", lambda name: None)

    assert webhook_setup.webhook_problems(load(table(secret_file=f'"{tmp_path}/secret"'))) == (
        "webhooks need `pip install runrecovery-service[webhooks]`",
    )


def test_a_service_without_webhooks_imports_nothing_that_sends(load: Load) -> None:
    code = (
        "import sys; from runrecovery_service import app;"
        "from runrecovery_service.setup import webhooks as webhook_setup;"
        "from runrecovery_service.config.settings import Settings;"
        "assert webhook_setup.build_endpoints(Settings()) == ();"
        "print(sorted(n for n in sys.modules if n == 'h11' or '_service.webhooks' in n))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ran.stdout.strip() == (
        "['runrecovery_service.webhooks', 'runrecovery_service.webhooks.webhooks']"
    )


def test_check_reports_what_a_start_would_refuse(load: Load, tmp_path: Path) -> None:
    settings = load(f'data_dir = "{tmp_path}/data"\n' + table(secret_file=f'"{tmp_path}/none"'))

    assert f"webhook 'chat': {tmp_path}/none: No such file or directory" in offline.check(settings)
    assert of_class(START_EXIT_CODES, WebhooksRefused, otherwise=ExitCode.FAILED) is ExitCode.USAGE
