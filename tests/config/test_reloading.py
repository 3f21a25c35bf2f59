"""What a reload takes over from a configuration, and what it leaves to a restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
from runrecovery_service.config.reading import ConfigError
from runrecovery_service.config.reloading import RELOADABLE, plan_reload
from runrecovery_service.config.settings import LogLevel, Settings
from support.callers import digest_of, token_of

Load: TypeAlias = Callable[..., Settings]

ENGINE = '[engines.e]\ncommand = ["/bin/true"]\nprofile = "resumable"\n'
CI = f'[[callers]]\nname = "ci"\nrole = "viewer"\ntoken_sha256 = "{digest_of(token_of("ci"))}"\n'
TLS = '[tls]\ncertificate = "{}.pem"\nkey = "a.key"\n'
MUTUAL = TLS + 'client_ca = "ca.pem"\nclient_auth = "require"\n'
WITH_CERTIFICATE = '[[callers]]\nname = "ci"\nrole = "viewer"\ncertificate_name = "ci"\n'


def test_changes_of_reloadable_keys_are_taken_over_and_others_named(load: Load) -> None:
    present = load('max_queued = 1\nlisten = "127.0.0.1:1"\n' + ENGINE)

    plan = plan_reload(present, load('max_queued = 2\nlog_level = "debug"\n' + ENGINE + CI))

    assert plan.changed == ("log_level", "callers")
    assert plan.needs_restart == ("listen", "max_queued")
    assert (plan.settings.max_queued, plan.settings.listen) == (1, "127.0.0.1:1")
    assert plan.settings.log_level is LogLevel.DEBUG
    assert [caller.name for caller in plan.settings.callers] == ["ci"]


def test_the_same_configuration_changes_nothing(load: Load) -> None:
    plan = plan_reload(load(ENGINE + CI), load(ENGINE + CI))

    assert (plan.changed, plan.needs_restart) == ((), ())


def test_an_empty_file_takes_neither_all_engines_nor_all_callers_away(load: Load) -> None:
    present = load(ENGINE + CI)

    plan = plan_reload(present, load(""))

    assert (plan.changed, plan.needs_restart) == ((), ("callers", "engines"))
    assert plan.settings == present


@pytest.mark.parametrize(
    ("before", "after", "needs_restart"),
    [
        (TLS.format("a"), TLS.format("b"), ()),
        (MUTUAL.format("a"), MUTUAL.format("b"), ()),
        (TLS.format("a"), MUTUAL.format("a"), ("tls.client_auth",)),
        (MUTUAL.format("a"), TLS.format("b"), ("tls.client_auth",)),
        ("", TLS.format("a"), ("tls",)),
        (TLS.format("a"), "", ("tls",)),
    ],
)
def test_files_of_tls_can_be_replaced_and_its_kind_cannot(
    load: Load, before: str, after: str, needs_restart: tuple[str, ...]
) -> None:
    present, read = load(before), load(after)

    plan = plan_reload(present, read)

    assert plan.needs_restart == needs_restart
    assert plan.settings.tls == (present if needs_restart else read).tls


def test_a_change_that_contradicts_what_needs_a_restart_is_refused(load: Load) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_reload(load(TLS.format("a") + CI), load(MUTUAL.format("a") + WITH_CERTIFICATE))

    assert refused.value.problems == (
        'callers[0].certificate_name: needs tls.client_auth = "require"',
        "a reload leaves these as they are: tls.client_auth; restart",
    )


def test_callers_without_the_tls_that_comes_with_them_are_refused(load: Load) -> None:
    insecure = 'listen = "10.0.0.1:1"\ninsecure_listen = true\n'
    secure = 'listen = "10.0.0.1:1"\n' + TLS.format("a") + CI

    with pytest.raises(ConfigError) as refused:
        plan_reload(load(insecure), load(secure))

    assert refused.value.problems == (
        (
            "listen: 10.0.0.1:1 can be reached from other machines, and there is no [tls]; add what"
            " is missing, listen on 127.0.0.1, or set insecure_listen = true"
        ),
        "a reload leaves these as they are: insecure_listen, tls; restart",
    )


def test_these_keys_are_reloadable() -> None:
    assert {"log_level", "tls", "callers", "retention", "engines", "webhooks"} == RELOADABLE


@pytest.mark.parametrize(
    ("before", "after", "changed", "needs_restart"),
    [
        ('[retention]\noutputs = "7d"\n', '[retention]\noutputs = "8d"\n', ("retention",), ()),
        ("", '[retention]\noutputs = "8d"\n', (), ("retention",)),
        ('[retention]\noutputs = "7d"\n', "", (), ("retention",)),
    ],
)
def test_ages_of_retention_can_be_changed_and_its_table_neither_added_nor_removed(
    load: Load, before: str, after: str, changed: tuple[str, ...], needs_restart: tuple[str, ...]
) -> None:
    plan = plan_reload(load(before), load(after))

    assert (plan.changed, plan.needs_restart) == (changed, needs_restart)
