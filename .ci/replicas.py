"""Check the replicas of a file of deploy/, which comes as JSON on standard input.

The configuration of each replica is accepted, no two replicas have one name or one data directory,
and a stop has the time that it may take.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runrecovery_service.config import reading
from runrecovery_service.config.settings import Settings

DIGEST_PLACE = "SHA-256 OF THE TOKEN"
FROM_POD = {"metadata.name": "runrecovery-{number}"}
FROM_SECRET = {"runrecovery-database": "postgresql://runrecovery@db/runrecovery"}


def main() -> None:
    """Check the file that is named by the argument; exit with the first problem."""
    documents = [one for one in json.load(sys.stdin) if one]
    replicas = list(
        of_compose(documents[0]) if "services" in documents[0] else of_kubernetes(documents)
    )
    names = {settings.instance for settings, _ in replicas}
    places = {settings.data_dir for settings, _ in replicas}
    if len(names) != len(replicas):
        sys.exit(f"{sys.argv[1]}: {len(replicas)} replicas have the names {sorted(names)}")
    if "services" in documents[0] and len(places) != len(replicas):  # each pod has its own volume
        sys.exit(f"{sys.argv[1]}: {len(replicas)} replicas have the data directories {places}")
    for settings, stop_s in replicas:
        needed_s = stop_time_s(settings)
        if stop_s <= needed_s:
            sys.exit(
                f"{sys.argv[1]}: a stop may take {needed_s:g} s, but is killed after {stop_s:g} s"
            )
    if len(replicas) > 1 and not all(one.database for one, _ in replicas):
        sys.exit(f"{sys.argv[1]}: several replicas need PostgreSQL")
    print(f"{sys.argv[1]}: {len(replicas)} replicas, which have time to stop")


def stop_time_s(settings: Settings) -> float:
    """Return how long a planned stop may take (docs/operations.md, Stop)."""
    return (
        settings.finish_s
        + settings.drain_delay_s
        + settings.stop_grace_s
        + settings.cancel_grace_s
        + settings.orphan_deadline_s
    )


def of_kubernetes(documents: list[Any]) -> Iterator[tuple[Settings, float]]:
    """Return the settings of each pod, and the seconds that its stop has."""
    text = next(one["data"]["runrecovery.toml"] for one in documents if one["kind"] == "ConfigMap")
    workload = next(one for one in documents if one["kind"] in ("StatefulSet", "Deployment"))
    budgets = [one for one in documents if one["kind"] == "PodDisruptionBudget"]
    if [one["spec"]["selector"] for one in budgets] != [workload["spec"]["selector"]]:
        sys.exit(f"{sys.argv[1]}: no PodDisruptionBudget selects the pods")
    pod = workload["spec"]["template"]["spec"]
    for number in range(workload["spec"]["replicas"]):
        environ = {
            one["name"]: value_of(one, number) for one in pod["containers"][0].get("env", [])
        }
        yield load(text, environ), pod["terminationGracePeriodSeconds"]


def value_of(variable: dict[str, Any], number: int) -> str:
    """Return what a pod gets as the value of a variable."""
    if "value" in variable:
        return str(variable["value"])
    source = variable["valueFrom"]
    if "secretKeyRef" in source:
        return FROM_SECRET[source["secretKeyRef"]["name"]]
    return FROM_POD[source["fieldRef"]["fieldPath"]].format(number=number)


def of_compose(document: dict[str, Any]) -> Iterator[tuple[Settings, float]]:
    """Return the settings of each service that is a replica, and the seconds that its stop has."""
    example = Path("runrecovery.example.toml").read_text("utf-8")
    for service in document["services"].values():
        environ = {name: str(value) for name, value in service["environment"].items()}
        if "RUNRECOVERY_INSTANCE" in environ:
            yield load(example, environ), float(service["stop_grace_period"].removesuffix("s"))


def load(text: str, environ: dict[str, str]) -> Settings:
    """Return the settings of a file and an environment; exit with what is wrong with them."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text.replace(DIGEST_PLACE, "a" * 64))
        file.flush()
        try:
            return reading.load(path=Path(file.name), flags={}, environ=environ)
        except reading.ConfigError as error:
            sys.exit(f"{sys.argv[1]}: {error}")


if __name__ == "__main__":
    main()
