"""Alerts and dashboard: expressions are valid, use metrics that exist, and fire as they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from runrecovery_service.metrics.setup import ALERTED_EVENTS

ROOT: Final = Path(__file__).parents[2]
ALERTS: Final = ROOT / "deploy" / "alerts.yaml"
DASHBOARD: Final = ROOT / "deploy" / "grafana.json"
PAGE: Final = ROOT / "docs" / "metrics.md"
METRIC: Final = re.compile(r"\brunrecovery_[a-z_]+")

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing (Debian package prometheus)"
)


def dashboard_expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def documented() -> Iterator[str]:
    """Yield the series of every metric of the page."""
    rows = re.findall(r"^\| `(runrecovery_\w+)` \| (\w+) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    for name, kind in rows:
        if kind == "histogram":
            yield from (f"{name}_{part}" for part in ("bucket", "sum", "count"))
        else:
            yield name


def test_alerts_and_dashboard_use_only_metrics_of_the_page() -> None:
    used = set(METRIC.findall(" ".join(dashboard_expressions())))
    alerted = set(METRIC.findall(ALERTS.read_text("utf-8")))

    assert used - set(documented()) == set()
    assert alerted - set(documented()) == set()
    assert len(used) > 20
    assert len(alerted) > 10


def test_every_alert_is_on_the_page() -> None:
    alerts = re.findall(r"- alert: (\w+)", ALERTS.read_text("utf-8"))
    told = re.findall(r"^\| `(Runrecovery\w+)` \|", PAGE.read_text("utf-8"), re.MULTILINE)

    assert sorted(told) == sorted(alerts)


def test_every_warning_that_the_guide_calls_worth_an_alert_has_one() -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    told = text.partition("Worth an alert:\n")[2].partition("exit codes")[0]
    warnings = [
        event for event in re.findall(r"`(\w+\.\w+)`", told) if event != "rpc.internal_error"
    ]

    assert sorted(warnings) == sorted(ALERTED_EVENTS)
    assert [event for event in ALERTED_EVENTS if event not in ALERTS.read_text("utf-8")] == []


@needs_promtool
def test_every_expression_of_the_dashboard_can_be_parsed(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(dashboard_expressions())
    ]
    file = tmp_path / "panels.yaml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}), "utf-8")

    done = subprocess.run(
        ["promtool", "check", "rules", str(file)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(rules)} rules found" in done.stdout


@needs_promtool
def test_each_alert_fires_for_a_service_in_trouble_and_none_for_one_at_work(
    tmp_path: Path,
) -> None:
    cases = (ROOT / "tests" / "metrics" / "alerts_test.yaml").read_text("utf-8")
    file = tmp_path / "alerts_test.yaml"
    file.write_text(cases.replace("RULES", str(ALERTS)), "utf-8")

    done = subprocess.run(
        ["promtool", "test", "rules", str(file)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_every_alert_has_its_case() -> None:
    cases = (ROOT / "tests" / "metrics" / "alerts_test.yaml").read_text("utf-8")
    alerts = re.findall(r"- alert: (\w+)", ALERTS.read_text("utf-8"))

    assert set(re.findall(r'alertname="(\w+)"', cases)) == set(alerts)
