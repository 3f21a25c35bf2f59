"""Who may do what in the console: login, roles, forged forms, headers."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from runrecovery_service.console.live import MAX_STREAMS_OF_CALLER
from runrecovery_service.console.visitors import form_token
from support.api import Api
from support.callers import caller, digest_of, token_of
from support.console_api import ConsoleVisit
from support.http_api import http_address
from support.service import Home, ServiceProcess

PAGES = ("/", "/runs", "/restarts", "/plan", "/instances")
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none';"
    " object-src 'none'"
)


def logged_in(service: ServiceProcess, role: str) -> ConsoleVisit:
    """Return a visitor who has logged in as the caller of a role."""
    visit = ConsoleVisit(http_address(service))
    assert visit.log_in(token_of(role)).status == 303
    return visit


def ask(api: Api, run_id: str) -> None:
    """Let a run ask a question."""
    api.create("resumable", {"questions": [{"prompt": "So?"}]}, run_id=run_id)
    api.until_status(run_id, "WAITING_USER")


def test_visitors_log_in_first(guarded: ServiceProcess) -> None:
    visit = ConsoleVisit(http_address(guarded))

    pages = [visit.get(path) for path in ("/", "/runs?status=failed", "/live/waiting")]

    assert [(page.status, page.headers.get("location")) for page in pages] == [
        (303, "/login"),
        (303, "/login?next=%2Fruns%3Fstatus%3Dfailed"),
        (401, None),
    ]


def test_a_wrong_token_is_refused_and_logged_without_the_token(guarded: ServiceProcess) -> None:
    visit = ConsoleVisit(http_address(guarded))

    refused = visit.log_in("f" * 64)

    assert (refused.status, visit.cookies) == (401, {})
    assert b"No caller has this token." in refused.body
    guarded.until_event("rpc.call_refused")
    assert "f" * 64 not in guarded.text


def test_a_wrong_token_in_a_cookie_is_logged_as_that_of_a_call(tmp_path: Path) -> None:
    callers = [caller("boss", "operator")]
    with Home(tmp_path, http_listen="127.0.0.1:0", callers=callers, token=token_of("boss")) as home:
        service, _ = home.start()
        visit = ConsoleVisit(http_address(service))
        visit.cookies["runrecovery-token"] = "f" * 64

        for path in ("/", "/nothing", "/live/waiting", "/static/nothing"):
            visit.get(path)
        service.stop()

        # A refused call is paced where it is logged.
        assert sum(event["calls"] for event in service.events("rpc.call_refused")) == 4
        assert "f" * 64 not in service.text


def test_a_caller_cannot_take_the_streams_of_all_others(guarded: ServiceProcess) -> None:
    creator, viewer = logged_in(guarded, "creator"), logged_in(guarded, "viewer")
    with ExitStack() as open_pages:
        for _ in range(MAX_STREAMS_OF_CALLER):
            response = open_pages.enter_context(creator.opened("/live/waiting"))
            assert response.status == 200
            response.readline()  # the stream has begun

        with creator.opened("/live/waiting") as response:
            assert response.status == 503
        with viewer.opened("/live/waiting") as response:
            assert response.status == 200


def test_a_verb_that_a_page_does_not_accept_is_refused_with_those_that_it_does(
    guarded: ServiceProcess,
) -> None:
    refused = logged_in(guarded, "viewer").post("/runs", {})

    assert (refused.status, sorted(refused.headers["allow"].split(", "))) == (405, ["GET", "HEAD"])


@pytest.mark.parametrize("path", ["/runs/", "/login/", "/static", "/static/nothing"])
def test_an_address_that_is_almost_one_leads_nowhere_and_is_not_kept(
    guarded: ServiceProcess, path: str
) -> None:
    reply = ConsoleVisit(http_address(guarded)).get(path)

    assert (reply.status, reply.headers.get("location")) == (404, None)
    assert reply.headers["cache-control"] == "no-store"


def test_the_cookie_is_for_this_site_alone_and_not_for_scripts(guarded: ServiceProcess) -> None:
    visit = ConsoleVisit(http_address(guarded))

    cookie = visit.log_in(token_of("viewer")).headers["set-cookie"]

    assert cookie == (
        f"runrecovery-token={token_of('viewer')}; HttpOnly; Max-Age=43200; Path=/; SameSite=strict"
    )


def test_a_token_that_is_removed_by_a_reload_is_a_login_no_more(tmp_path: Path) -> None:
    callers = [caller("ada", "viewer"), caller("boss", "operator")]
    with Home(tmp_path, http_listen="127.0.0.1:0", callers=callers, token=token_of("boss")) as home:
        service, _ = home.start()
        visit = logged_in(service, "ada")
        assert visit.get("/").status == 200
        home.write_config(callers=callers[1:])
        service.popen.send_signal(signal.SIGHUP)
        service.until_event("service.reloaded")

        assert visit.get("/").headers["location"] == "/login"
        assert visit.get("/live/waiting").status == 401


def test_a_token_with_characters_of_base64_keeps_its_login(tmp_path: Path) -> None:
    token = "aB3/xY+9" * 5 + "=="
    callers = [caller("boss", "operator", token_sha256=digest_of(token))]
    with Home(tmp_path, http_listen="127.0.0.1:0", callers=callers, token=token) as home:
        service, _ = home.start()
        visit = ConsoleVisit(http_address(service))
        visit.log_in(token)

        assert visit.get("/instances").status == 200


def test_a_caller_with_few_calls_at_a_time_can_open_a_run(tmp_path: Path) -> None:
    callers = [caller("ada", "creator", max_calls=2)]
    with Home(tmp_path, http_listen="127.0.0.1:0", callers=callers, token=token_of("ada")) as home:
        service, api = home.start()
        ask(api, "few-calls")

        assert logged_in(service, "ada").get("/runs/few-calls").status == 200


def test_a_link_of_another_site_leads_to_the_page_and_not_to_the_login(
    guarded: ServiceProcess,
) -> None:
    visit = ConsoleVisit(http_address(guarded))

    page = visit.get("/runs", Sec_Fetch_Site="cross-site")

    assert (page.status, b'http-equiv="refresh" content="0"' in page.body) == (200, True)


@pytest.mark.parametrize(
    ("role", "statuses"),
    [
        ("viewer", [200, 200, 403, 403, 403]),
        ("replier", [200, 200, 403, 403, 403]),
        ("creator", [200, 200, 403, 403, 403]),
        ("operator", [200, 200, 200, 200, 200]),
    ],
)
def test_the_pages_about_restarts_are_for_operators(
    guarded: ServiceProcess, role: str, statuses: list[int]
) -> None:
    visit = logged_in(guarded, role)

    assert [visit.get(path).status for path in PAGES] == statuses


def test_a_viewer_has_no_buttons_and_the_contract_refuses_a_form(guarded: ServiceProcess) -> None:
    ask(guarded.api(), "not-yours")
    viewer, replier = logged_in(guarded, "viewer"), logged_in(guarded, "replier")

    page = viewer.get("/runs/not-yours").body
    form = {**replier.form_of("not-yours"), "text": "go"}
    form["form_token"] = viewer.form_of("not-yours")["form_token"]  # of the logout
    sent = viewer.post("/runs/not-yours/answer", form)

    assert b"/answer" not in page
    assert b"/cancel" not in page
    assert b"Your role may read, but not answer." in page
    assert sent.status == 403
    assert guarded.api().get("not-yours").HasField("pending_interaction")


def test_an_answer_names_its_caller(guarded: ServiceProcess) -> None:
    api = guarded.api()
    ask(api, "audited")
    replier = logged_in(guarded, "replier")

    sent = replier.post("/runs/audited/answer", {**replier.form_of("audited"), "text": "go"})

    assert sent.status == 303
    assert [question.replied_by for question in api.interactions("audited")] == ["replier"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "null", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_form_of_another_site_does_nothing(
    visit: ConsoleVisit, api: Api, headers: Mapping[str, str]
) -> None:
    run_id = f"forged-{len(headers)}-{headers.get('Origin', '')[:4].strip(':') or 'none'}"
    ask(api, run_id)
    form = {**visit.form_of(run_id), "text": "go"}

    sent = visit.post(f"/runs/{run_id}/answer", form, **headers)

    assert sent.status == 403
    assert api.get(run_id).HasField("pending_interaction")


@pytest.mark.parametrize("token", ["", "0" * 64, "é"])
def test_a_form_without_its_token_does_nothing(visit: ConsoleVisit, api: Api, token: str) -> None:
    run_id = f"token-{len(token)}"
    ask(api, run_id)
    form = {**visit.form_of(run_id), "text": "go", "form_token": token}

    assert visit.post(f"/runs/{run_id}/answer", form).status == 403
    assert api.get(run_id).HasField("pending_interaction")


def test_every_page_has_the_headers_that_confine_it(visit: ConsoleVisit) -> None:
    for path in (*PAGES, "/runs/nobody", "/nothing", "/static/console.css"):
        headers = visit.get(path).headers
        assert headers["content-security-policy"] == POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        expected = "no-cache" if path.startswith("/static/") else "no-store"
        assert headers["cache-control"] == expected


def test_no_page_has_style_or_script_of_its_own(visit: ConsoleVisit, api: Api) -> None:
    ask(api, "plain")
    for path in (*PAGES, "/runs/plain"):
        page = visit.get(path).body.decode()
        assert "style=" not in page
        assert "<style" not in page
        assert page.count("<script") == 1
        assert re.search(r"<[^>]*\son[a-z]+=", page) is None
        assert "http://" not in page
        assert "https://" not in page


def test_without_callers_and_the_insecure_word_everyone_reads_and_nobody_writes(
    home_of_readers: tuple[ConsoleVisit, Api],
) -> None:
    visit, api = home_of_readers
    ask(api, "read-only")

    page = visit.get("/runs/read-only").body
    form = {**visit.form_of("read-only"), "text": "go", "interaction_id": "1"}
    form["etag"] = api.get("read-only").etag
    sent = visit.post("/runs/read-only/answer", form)

    assert b"Nobody may answer here" in page
    assert sent.status == 403
    assert api.get("read-only").HasField("pending_interaction")


@pytest.fixture(scope="module")
def home_of_readers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[ConsoleVisit, Api]]:
    with Home(tmp_path_factory.mktemp("readers"), http_listen="127.0.0.1:0") as home:
        service, api = home.start()
        yield ConsoleVisit(http_address(service)), api


def test_the_console_can_be_switched_off(tmp_path: Path) -> None:
    with Home(tmp_path, http_listen="127.0.0.1:0", console=False) as home:
        service, _ = home.start()
        visit = ConsoleVisit(http_address(service))

        assert (visit.get("/").status, visit.get("/healthz").status) == (404, 200)


def test_without_the_console_no_template_is_imported(tmp_path: Path) -> None:
    with Home(tmp_path, http_listen="127.0.0.1:0", console=False, may_fork=False) as home:
        home.env["PYTHONPROFILEIMPORTTIME"] = "1"
        service, _ = home.start()
        imported = {line.rpartition("|")[2].strip() for line in service.text.splitlines()}

    assert "uvicorn" in imported
    assert not imported & {"jinja2", "runrecovery_service.console", "starlette.applications"}


def test_another_name_of_the_host_is_refused(visit: ConsoleVisit) -> None:
    assert visit.get("/", Host="rebound.example").status == 421


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/runs/nobody/answer", {"text": "x"}, 404),
        ("/runs/..%2f/answer", {"text": "x"}, 404),
        ("/runs/UPPER/cancel", {}, 404),
    ],
)
def test_forms_of_runs_that_do_not_exist_are_not_found(
    visit: ConsoleVisit, path: str, fields: dict[str, str], status: int
) -> None:
    visit.get("/")
    form = {"form_token": token_in(visit), **fields}

    assert visit.post(path, form).status == status


def token_in(visit: ConsoleVisit) -> str:
    """Return the token of forms of a visitor without login."""
    return form_token(visit.cookies["runrecovery-form"])


def test_a_form_that_is_too_large_is_refused(visit: ConsoleVisit) -> None:
    visit.get("/")

    sent = visit.post("/runs/nobody/answer", {"text": "x" * (3 << 20)})

    assert sent.status == 413
