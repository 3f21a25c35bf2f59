"""Pages in a real browser: hostile text, roles, widths, keyboard, accessibility."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect
from support.api import Api
from support.browser import REBOUND, accessibility_problems
from support.callers import token_of
from support.console_api import first_answer
from support.engines import GOOD_ENGINES, script
from support.http_api import http_address
from support.service import Home, ServiceProcess
from support.waiting import patience_s

HOSTILE: Final = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    "\x1b[31mred\x1b[0m \u202etxet desrever\u202c \u2066isolated\u2069 zero\u200bwidth"
    " &amp; {{ 7 * 7 }} " + "W" * 3000
)
NOISE: Final = """
import json, sys
print(json.dumps({"type": "session", "value": "s"}))
hostile = json.loads(sys.stdin.readline())["input"]["hostile"]
sys.stderr.write("first line\\n")
for number in range(50_000):
    sys.stderr.write(f"{number} {'x' * 95}\\n")
sys.stderr.write("a NUL \\0 and a bell \\a\\n" + hostile + "\\nlast line\\n")
sys.stderr.flush()
fields = [hostile, {"label": hostile[:100], "value": "key"}]
print(json.dumps({"type": "ask", "kind": "fill_fields", "prompt": hostile, "options": fields}))
"""
NOBODY: Final = f"/runs/{'w' * 64}"
PAGES: Final = ("/", "/runs", "/runs/hostile", "/runs/ended", "/restarts", "/plan", "/instances")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A service with a run of each kind: hostile, waiting over a restart, failed, ended."""
    engines = {**GOOD_ENGINES, "noisy": script(NOISE)}
    folder = tmp_path_factory.mktemp("pages")
    with Home(folder, engines=engines, http_listen="127.0.0.1:0", insecure_listen=True) as home:
        service, api = home.start()
        labels = {"team": "shop", "note": HOSTILE[:200]}
        api.create("noisy", {"hostile": HOSTILE}, run_id="hostile", labels=labels)
        api.until_status("hostile", "WAITING_USER")
        for name, question in QUESTIONS.items():
            api.create("resumable", {"questions": [question]}, run_id=name)
            api.until_status(name, "WAITING_USER")
        api.create("resumable", {"hold": True}, run_id="ended")
        api.until_status("ended", "RUNNING")
        service.kill()
        yield home


QUESTIONS: Final[dict[str, dict[str, Any]]] = {
    "text": {"kind": "open_text", "prompt": "Why?"},
    "many": {"kind": "choose_one", "prompt": "Which?", "options": [*"abcdefgh"]},
    "risk": {"kind": "risk_ack", "prompt": "It may break."},
    "sure": {"kind": "confirm", "prompt": "Sure?"},
}


@pytest.fixture(scope="module")
def address(service: ServiceProcess) -> str:
    """The address of the console."""
    return f"http://{http_address(service)}"


@pytest.fixture
def context(browser: Browser, address: str) -> Iterator[BrowserContext]:
    """A browser in the zone of Tokyo."""
    with browser.new_context(base_url=address, timezone_id="Asia/Tokyo", locale="en-GB") as context:
        context.set_default_timeout(patience_s() * 1000)
        yield context


@pytest.mark.parametrize("path", ["/", "/runs", "/runs/hostile", "/runs/hostile?channel=stderr"])
def test_hostile_text_is_shown_and_does_nothing(context: BrowserContext, path: str) -> None:
    page = context.new_page()

    page.goto(path)

    text = page.inner_text("main")
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script").count() == 0
    assert "<script>window.hacked = 1</script>" in text
    assert "\x1b" not in text
    assert not set(text) & set("\u202e\u202c\u2066\u2069\u200b")
    if path != "/runs":  # its labels are cut
        assert "U+202E" in text
        assert "{{ 7 * 7 }}" in text


def test_five_megabytes_of_output_are_shown_from_their_end(context: BrowserContext) -> None:
    page = context.new_page()

    page.goto("/runs/hostile?channel=stderr")

    output = page.inner_text("#output")
    assert len(page.content()) < 100_000
    assert output.rstrip().endswith("last line")
    assert "a NUL U+0000 and a bell U+0007" in output
    page.get_by_role("link", name="Show earlier output").click()
    expect(page.get_by_role("link", name="Show more")).to_be_visible()
    page.goto("/runs/hostile?channel=stderr&from=0")
    assert page.inner_text("#output").startswith("first line\n0 xxx")


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("path", [*PAGES, "/restarts/latest", NOBODY])
def test_no_page_is_wider_than_its_window(context: BrowserContext, path: str, width: int) -> None:
    page = context.new_page()
    page.set_viewport_size({"width": width, "height": 844})

    go_to(page, path)

    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", [*PAGES, "/restarts/latest", "/runs/nobody"])
def test_axe_finds_nothing_wrong(browser: Browser, address: str, path: str, scheme: Any) -> None:
    with browser.new_context(base_url=address, color_scheme=scheme) as context:
        page = context.new_page()
        go_to(page, path)

        assert accessibility_problems(page) == []


def test_axe_finds_nothing_wrong_with_the_login(browser: Browser, guarded: ServiceProcess) -> None:
    with browser.new_context(base_url=f"http://{http_address(guarded)}") as context:
        page = context.new_page()
        page.goto("/")

        assert page.title() == "Log in · runrecovery"
        assert accessibility_problems(page) == []


def go_to(page: Page, path: str) -> None:
    """Open a page; `/restarts/latest` is the first report of the list."""
    if path != "/restarts/latest":
        page.goto(path)
        return
    page.goto("/restarts")
    page.locator("td.first a").first.click()
    expect(page.get_by_role("heading", name="Phases")).to_be_visible()


def test_no_request_leaves_the_service(context: BrowserContext, address: str) -> None:
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()

    for path in PAGES:
        page.goto(path, wait_until="load")

    assert len(asked) >= len(PAGES)
    assert [url for url in asked if not url.startswith(f"{address}/")] == []


def test_a_rebound_name_is_refused(context: BrowserContext, address: str) -> None:
    page = context.new_page()

    response = page.goto(f"http://{REBOUND}:{address.rpartition(':')[2]}/")

    assert response is not None
    assert response.status == 421


def test_times_are_in_the_zone_of_the_viewer_and_exact_in_utc(
    context: BrowserContext, service: ServiceProcess
) -> None:
    created = service.api().get("text").created_at.ToDatetime()
    page = context.new_page()
    page.goto("/runs/text")

    shown = page.locator(".events time").first
    hour = (created.hour + 9) % 24

    assert shown.inner_text().endswith(f"{hour:02d}:{created:%M:%S}")
    milliseconds = f"{created.microsecond // 1000:03d}"
    assert shown.get_attribute("title") == f"{created:%Y-%m-%d %H:%M:%S}.{milliseconds} UTC"


def test_runs_are_filtered_by_times_in_the_zone_of_the_viewer(
    context: BrowserContext, service: ServiceProcess
) -> None:
    created = service.api().get("text").created_at.ToDatetime().replace(second=0, microsecond=0)
    first, last = (f"{created + timedelta(minutes=at):%Y-%m-%dT%H:%M}" for at in (0, 1))
    tokyo = timedelta(hours=9)
    here = [f"{created + tokyo + timedelta(minutes=at):%Y-%m-%dT%H:%M}" for at in (0, 1)]
    page = context.new_page()
    page.goto("/runs")

    page.get_by_label("Created from (your time)").fill(here[0])
    page.get_by_label("Created before (your time)").fill(here[1])
    page.get_by_role("button", name="Show").click()

    expect(page.get_by_role("link", name="text", exact=True)).to_be_visible()
    query = parse_qs(urlsplit(page.url).query)
    assert (query["after"], query["before"]) == ([first], [last])
    assert page.get_by_label("Created from (your time)").input_value() == here[0]
    page.get_by_label("Created from (your time)").fill(here[1])
    page.get_by_label("Created before (your time)").fill("")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("link", name="text", exact=True)).to_have_count(0)


def test_without_a_script_runs_are_filtered_by_times_in_utc(
    browser: Browser, address: str, service: ServiceProcess
) -> None:
    created = service.api().get("text").created_at.ToDatetime().replace(second=0, microsecond=0)
    minute = f"{created:%Y-%m-%dT%H:%M}"
    with browser.new_context(base_url=address, java_script_enabled=False) as context:
        page = context.new_page()
        page.goto("/runs")
        page.get_by_label("Created before (UTC)").fill(minute)
        page.get_by_role("button", name="Show").click()
        assert page.get_by_role("link", name="text", exact=True).count() == 0
        assert page.get_by_label("Created before (UTC)").input_value() == minute

        page.get_by_label("Created before (UTC)").fill("")
        page.get_by_label("Created from (UTC)").fill(minute)
        page.get_by_role("button", name="Show").click()

        assert page.get_by_role("link", name="text", exact=True).count() == 1


def test_a_question_is_answered_by_the_keyboard_alone(context: BrowserContext, api: Api) -> None:
    api.create("resumable", {"questions": [QUESTIONS["sure"]]}, run_id="keys")
    api.until_status("keys", "WAITING_USER")
    page = context.new_page()
    page.goto("/runs/keys")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Yes"
    page.keyboard.press("Enter")

    expect(page.get_by_text("Your answer is recorded.")).to_be_visible()
    assert first_answer(api, "keys") == "yes"


def test_without_a_script_a_question_is_read_and_answered(
    browser: Browser, address: str, api: Api
) -> None:
    api.create("resumable", {"questions": [QUESTIONS["risk"]]}, run_id="no-script")
    api.until_status("no-script", "WAITING_USER")
    with browser.new_context(base_url=address, java_script_enabled=False) as context:
        page = context.new_page()
        for path in PAGES:
            response = page.goto(path)
            assert response is not None
            assert response.status == 200
        page.goto("/runs/no-script")
        assert page.locator("time").first.inner_text().endswith(" UTC")
        page.get_by_label("I have read this, and accept the risk").check()
        page.get_by_role("button", name="Accept the risk").click()
        assert page.get_by_text("Your answer is recorded.").is_visible()

    assert first_answer(api, "no-script") == "yes"


def test_a_viewer_has_no_buttons_and_cannot_send_the_form_nevertheless(
    browser: Browser, guarded: ServiceProcess
) -> None:
    api = guarded.api()
    api.create("resumable", {"questions": [QUESTIONS["text"]]}, run_id="look-only")
    api.until_status("look-only", "WAITING_USER")
    with browser.new_context(base_url=f"http://{http_address(guarded)}") as context:
        page = context.new_page()
        page.goto("/runs/look-only")
        page.get_by_label("Token").fill(token_of("viewer"))
        page.get_by_role("button", name="Log in").click()

        expect(page.get_by_text("Your role may read, but not answer.")).to_be_visible()
        assert [each.inner_text() for each in page.get_by_role("button").all()] == ["Log out"]
        status = page.evaluate(
            """async () => {
                const form_token = document.querySelector("input[name=form_token]").value;
                const fields = { form_token, interaction_id: "1", text: "go", etag: "" };
                const body = new URLSearchParams(fields);
                return (await fetch("/runs/look-only/answer", { method: "POST", body })).status;
            }"""
        )
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_label("Token")).to_be_visible()

    assert status == 403
    assert api.get("look-only").HasField("pending_interaction")
