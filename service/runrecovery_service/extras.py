"""Checks that the optional packages which a configuration needs are installed."""

from __future__ import annotations

from importlib.util import find_spec

from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.start_errors import PackagesMissing


def missing_packages(settings: Settings) -> list[str]:
    """Return a sentence for each key whose packages are not installed."""
    problems = []
    if settings.metrics_listen and not _is_installed("prometheus_client"):
        problems.append("metrics_listen: needs `pip install runrecovery-service[metrics]`")
    if settings.http_listen and not (_is_installed("uvicorn") and _is_installed("starlette")):
        problems.append("http_listen: needs `pip install runrecovery-service[http]`")
    if settings.traces and not _is_installed("opentelemetry.exporter.otlp.proto.http"):
        problems.append("traces: needs `pip install runrecovery-service[traces]`")
    return problems


def demand_packages(settings: Settings) -> None:
    """Raise if the configuration needs a package that is not installed.

    Raises:
        PackagesMissing: a package is missing; the error lists every key that needs one.
    """
    if problems := missing_packages(settings):
        raise PackagesMissing(tuple(problems))


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ValueError, ModuleNotFoundError):  # a test has hidden the module
        return False
