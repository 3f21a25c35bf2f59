"""Services with a console that the tests of a module share, and that none of them stops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser
from support.api import Api
from support.browser import opened_browser
from support.callers import caller, token_of
from support.console_api import ConsoleVisit
from support.http_api import http_address
from support.service import Home, ServiceProcess

ROLES = ("viewer", "replier", "creator", "operator")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("console")
    with Home(folder, http_listen="127.0.0.1:0", insecure_listen=True) as home:
        yield home


@pytest.fixture(scope="module")
def service(home: Home) -> ServiceProcess:
    """A service without callers, where everyone may write."""
    service, _ = home.start()
    return service


@pytest.fixture(scope="module")
def api(service: ServiceProcess) -> Api:
    """A gRPC channel to the module's service."""
    return service.api()


@pytest.fixture
def visit(service: ServiceProcess) -> ConsoleVisit:
    """A visitor of the module's service."""
    return ConsoleVisit(http_address(service))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service with a caller of each role, named like the role."""
    callers = [caller(role, role) for role in ROLES]
    folder = tmp_path_factory.mktemp("guarded")
    with Home(
        folder, http_listen="127.0.0.1:0", callers=callers, token=token_of("operator")
    ) as home:
        service, _ = home.start()
        yield service


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The Chromium of this machine. Tests that take it are skipped where there is none.

    Not longer than a module: playwright runs an event loop in this thread meanwhile, and asyncio
    then refuses those of other tests.
    """
    with opened_browser() as browser:
        yield browser
