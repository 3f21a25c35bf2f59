"""The pages about the service: restarts, a report, the plan, the instances."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from runrecovery_service.console.contract import Contract
from runrecovery_service.console.instance_view import instance_view
from runrecovery_service.console.live import instances_version, service_version
from runrecovery_service.console.moments import moment_of
from runrecovery_service.console.pages import Site
from runrecovery_service.console.plan_view import plan_view, planned_row
from runrecovery_service.console.reports import report_row, report_view, service_view
from runrecovery_service.console.run_list import row_of
from runrecovery_service.console.visitors import Visitor

_REPORT_ID: Final = re.compile(r"[0-9A-Za-z_-]{1,64}")


class ServicePages:
    """The pages about the service. If callers are configured, only operators can see the pages."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def restarts(self, request: Request, visitor: Visitor, contract: Contract) -> Response:
        """Show the reports, and the recovery that is under way."""
        status = await contract.status()
        token = request.query_params.get("page", "")
        answer = await contract.list_reports(token)
        following = answer.next_page_token
        return self._site.renderer.page(
            "restarts",
            visitor,
            service=service_view(status),
            rows=[report_row(report) for report in answer.reconciliations],
            next=f"/restarts?{urlencode({'page': following})}" if following else "",
            is_first=not token,
            live="/live/service",
            version=service_version(status),
        )

    async def report(self, request: Request, visitor: Visitor, contract: Contract) -> Response:
        """Show a report."""
        report_id = request.path_params["report_id"]
        if not _REPORT_ID.fullmatch(report_id):
            return self._site.not_found(visitor)
        report = report_view(await contract.get_report(report_id))
        # Runs can be listed only once the recovery is over.
        runs = await contract.recovered_runs(report_id) if report.finished_at else []
        version = service_version(await contract.status())
        return self._site.renderer.page(
            "report",
            visitor,
            report=report,
            rows=[row_of(run) for run in runs],
            live="/live/service",
            version=version,
        )

    async def plan(self, request: Request, visitor: Visitor, contract: Contract) -> Response:
        """Show the decisions that a restart would make now."""
        token = request.query_params.get("page", "")
        answer = await contract.plan(token)
        following = answer.next_page_token
        return self._site.renderer.page(
            "plan",
            visitor,
            plan=plan_view(answer.plan) if answer.HasField("plan") else None,
            rows=[planned_row(decision) for decision in answer.decisions],
            now=moment_of(datetime.now(UTC)),
            next=f"/plan?{urlencode({'page': following})}" if following else "",
            live="/live/service",
            version=service_version(await contract.status()),
        )

    async def instances(self, request: Request, visitor: Visitor, contract: Contract) -> Response:
        """Show the instances."""
        instances = await contract.instances()
        now = datetime.now(UTC)
        return self._site.renderer.page(
            "instances",
            visitor,
            instances=[instance_view(each, now) for each in instances],
            live="/live/instances",
            version=instances_version(instances),
        )
