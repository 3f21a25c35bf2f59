"""Reads the metrics of a service, as Prometheus does."""

from __future__ import annotations

from http.client import HTTPConnection
from typing import TypeAlias

from prometheus_client.parser import text_string_to_metric_families

from support.service import ServiceProcess

Samples: TypeAlias = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""The values by the name and the labels."""


def get(address: str, path: str) -> tuple[int, bytes]:
    """Return the status and the body that a path has."""
    connection = HTTPConnection(address, timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def scrape(service: ServiceProcess) -> Samples:
    """Return every sample of a service that was started with `metrics_listen`."""
    address = service.until_event("service.listening")["metrics_address"]
    status, body = get(address, "/metrics")
    assert status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    """Return one sample; None: it is not there."""
    return samples.get((name, frozenset(labels.items())))
