"""Calls of the contract over HTTP: the Connect protocol with one response."""

from __future__ import annotations

from support.api import Api
from support.http_api import RUNS, HttpApi


def test_a_run_is_created_read_and_answered_as_json(http: HttpApi, api: Api) -> None:
    given = {"engine": "resumable", "runId": "asks", "input": {"questions": [{"prompt": "Why?"}]}}

    created = http.post(f"{RUNS}/CreateRun", given)
    api.until_status("asks", "WAITING_USER")
    read = http.post(f"{RUNS}/GetRun", {"run_id": "asks"})
    reply = {"runId": "asks", "interactionId": 1, "response": "Because."}
    answered = http.post(f"{RUNS}/SubmitReply", reply)

    assert (created.status, created.json["run"]["status"]) == (200, "RUN_STATUS_QUEUED")
    assert read.headers["content-type"] == "application/json"
    assert read.json["run"]["pendingInteraction"]["prompt"] == "Why?"
    assert (answered.status, answered.json["run"]["runId"]) == (200, "asks")
    assert api.until_ended("asks").run_id == "asks"


def test_a_refused_call_has_the_reason_and_details_of_grpc(http: HttpApi) -> None:
    refused = http.post(f"{RUNS}/GetRun", {"runId": "nobody"})

    assert (refused.status, refused.json["code"], refused.reason) == (
        404,
        "not_found",
        "RUN_NOT_FOUND",
    )
    assert [detail["type"] for detail in refused.json["details"]] == [
        "google.rpc.ErrorInfo",
        "google.rpc.ResourceInfo",
    ]


def test_probes_answer_while_the_service_serves(http: HttpApi) -> None:
    assert [http.request("GET", path).status for path in ("/healthz", "/readyz")] == [200, 200]
