"""One service with HTTP that all tests of a module share, and that none of them stops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.api import Api
from support.http_api import HttpApi, http_address
from support.service import Home, ServiceProcess


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with Home(tmp_path_factory.mktemp("http"), http_listen="127.0.0.1:0", console=False) as home:
        yield home


@pytest.fixture(scope="module")
def service(home: Home) -> ServiceProcess:
    service, _ = home.start()
    return service


@pytest.fixture(scope="module")
def api(service: ServiceProcess) -> Api:
    """A gRPC channel to the module's service."""
    return service.api()


@pytest.fixture(scope="module")
def http(service: ServiceProcess) -> HttpApi:
    """The HTTP address of the module's service."""
    return HttpApi(http_address(service))
