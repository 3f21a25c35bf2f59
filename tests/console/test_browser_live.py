"""Pages that are open in a real browser while runs and the service change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from support.api import Api
from support.browser import free_port
from support.console_api import first_answer
from support.http_api import http_address
from support.processes import kill_below
from support.service import Home, ServiceProcess
from support.waiting import patience_s, until

QUESTION = {"kind": "open_text", "prompt": "Shall I go on?"}


@pytest.fixture
def page(browser: Browser, service: ServiceProcess) -> Iterator[Page]:
    """A page at the console of the module's service. An error of its script fails the test."""
    with browser.new_context(base_url=f"http://{http_address(service)}") as context:
        yield watched(context.new_page())


def watched(page: Page) -> Page:
    """Return a page that fails its test when its script has an error."""
    page.set_default_timeout(patience_s() * 1000)
    expect.set_options(timeout=patience_s() * 1000)

    def fail(error: object) -> None:
        raise AssertionError(f"the script of the page failed: {error}")

    page.on("pageerror", fail)
    return page


def ask(api: Api, run_id: str, **more: object) -> None:
    """Let a run ask a question."""
    api.create("resumable", {"questions": [{**QUESTION, **more}]}, run_id=run_id)
    api.until_status(run_id, "WAITING_USER")


def test_a_question_appears_is_answered_and_goes(page: Page, api: Api) -> None:
    page.goto("/")
    ask(api, "appears", kind="confirm", options=["Ship it", "Wait"])

    article = page.locator("#q-appears-1")
    article.get_by_role("button", name="Ship it").click()

    expect(page.get_by_text("Your answer is recorded.")).to_be_visible()
    expect(article).to_have_count(0)
    assert first_answer(api, "appears") == "Ship it"


def test_a_question_that_somebody_else_answers_goes_by_itself(page: Page, api: Api) -> None:
    ask(api, "theirs")
    page.goto("/")
    expect(page.locator("#q-theirs-1")).to_be_visible()

    api.reply("theirs", 1, "done")

    expect(page.locator("#q-theirs-1")).to_have_count(0)


def test_what_a_person_types_stays_when_somebody_else_answers(page: Page, api: Api) -> None:
    ask(api, "typed")
    page.goto("/")
    article = page.locator("#q-typed-1")
    article.get_by_role("textbox", name="Your answer").fill("my long thought")

    api.reply("typed", 1, "done")

    expect(article.get_by_text("This question no longer waits.")).to_be_visible()
    expect(article.get_by_role("textbox", name="Your answer")).to_have_value("my long thought")
    expect(article.get_by_role("button", name="Send answer")).to_be_disabled()


def test_an_answer_that_comes_too_late_says_so_and_the_page_goes_on(page: Page, api: Api) -> None:
    ask(api, "too-late")
    page.route("**/live/**", lambda route: route.abort())  # the news comes too late, too
    page.goto("/runs/too-late")
    page.get_by_role("textbox", name="Your answer").fill("my answer")
    api.reply("too-late", 1, "theirs")
    api.until_ended("too-late")
    page.evaluate("document.querySelector('form.answer').submit()")

    expect(page.get_by_text("Somebody else answered this question before you.")).to_be_visible()
    expect(page.get_by_text("my answer")).to_be_visible()
    page.unroute("**/live/**")
    page.goto("/runs/too-late")
    expect(page.get_by_role("heading", name="Result")).to_be_visible()


def test_other_questions_come_and_go_while_a_person_types(page: Page, api: Api) -> None:
    ask(api, "kept-open")
    page.goto("/")
    answer = page.locator("#q-kept-open-1").get_by_role("textbox", name="Your answer")
    answer.fill("half an ans")

    ask(api, "newcomer")
    expect(page.locator("#q-newcomer-1")).to_be_visible()
    answer.press_sequentially("wer")
    page.locator("#q-kept-open-1").get_by_role("button", name="Send answer").click()
    expect(page.get_by_text("Your answer is recorded.")).to_be_visible()

    (question,) = api.interactions("kept-open")
    assert question.response.string_value == "half an answer"


def test_the_list_of_runs_follows(page: Page, api: Api) -> None:
    ask(api, "listed")
    page.goto("/runs?status=waiting")
    row = page.locator("tr", has_text="listed")
    expect(row).to_contain_text("waiting for you")

    api.cancel("listed")

    expect(row).to_have_count(0)


def test_the_page_of_a_run_follows_its_events_and_its_output(page: Page, api: Api) -> None:
    api.create("resumable", {"work_s": 1.5, "questions": [QUESTION]}, run_id="followed")
    api.until_status("followed", "RUNNING")
    page.goto("/runs/followed")

    expect(page.locator("#output")).to_contain_text("worked 1.")
    expect(page.get_by_role("heading", name="The run waits for your answer")).to_be_visible()
    page.get_by_role("textbox", name="Your answer").fill("yes")
    page.get_by_role("button", name="Send answer").click()
    expect(page.get_by_role("heading", name="Result")).to_be_visible()
    expect(page.locator("#output")).to_contain_text('"result"')


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Home]:
    """A service that comes back at the same port."""
    address = f"127.0.0.1:{free_port()}"
    with Home(tmp_path, http_listen=address, insecure_listen=True) as home:
        yield home


def test_a_page_comes_back_by_itself_after_the_service_was_killed(
    browser: Browser, mortal: Home
) -> None:
    service, api = mortal.start()
    ask(api, "survivor")
    with browser.new_context(base_url=f"http://{mortal.settings['http_listen']}") as context:
        page = watched(context.new_page())
        page.goto("/runs/survivor")
        answer = page.get_by_role("textbox", name="Your answer")
        answer.fill("kept over the kill")

        service.kill()
        expect(page.get_by_text("The service is away.")).to_be_visible()
        _, api = mortal.start()

        expect(page.get_by_text("The service is away.")).to_be_hidden()
        expect(page.get_by_text("kept waiting, by resumable_waiting_preserved")).to_be_visible()
        expect(answer).to_have_value("kept over the kill")
        page.get_by_role("button", name="Send answer").click()
        expect(page.get_by_text("Your answer is recorded.")).to_be_visible()
    assert first_answer(api, "survivor") == "kept over the kill"


def test_a_page_says_that_the_service_recovers_and_comes_by_itself_after(
    browser: Browser, mortal: Home
) -> None:
    service, api = mortal.start()
    ask(api, "patient")
    orphan = api.create("resumable", {"hold": True, "ignore_sigterm": True}).run_id
    until(lambda: b"worked" in b"".join(one.data for one in api.output(orphan)), "it is at work")
    mortal.kill_with_shims(service)
    mortal.write_config(orphan_grace_s=300.0, orphan_deadline_s=600.0)
    service = mortal.listen()
    service.until_event("recovery.started")
    with browser.new_context(base_url=f"http://{http_address(service)}") as context:
        page = watched(context.new_page())

        response = page.goto("/runs/patient")

        assert response is not None
        assert response.status == 503
        assert '<noscript><meta http-equiv="refresh" content="3"></noscript>' in response.text()
        expect(page.get_by_role("heading", name="The service is not ready")).to_be_visible()
        expect(page.get_by_text("RECONCILIATION_IN_PROGRESS")).to_be_visible()
        restarts = context.new_page()
        restarts.goto("/restarts")
        expect(restarts.get_by_text("recovering", exact=True)).to_be_visible()

        assert kill_below(mortal.data / "runs")

        expect(page.get_by_role("heading", name="The run waits for your answer")).to_be_visible()
        expect(restarts.get_by_text("serving", exact=True)).to_be_visible()


def test_a_form_is_not_sent_while_the_service_is_away(browser: Browser, mortal: Home) -> None:
    service, api = mortal.start()
    ask(api, "unsent")
    with browser.new_context(base_url=f"http://{mortal.settings['http_listen']}") as context:
        page = watched(context.new_page())
        page.goto("/")
        answer = page.locator("#q-unsent-1").get_by_role("textbox", name="Your answer")
        answer.fill("not lost")
        service.kill()
        expect(page.get_by_text("The service is away.")).to_be_visible()

        page.get_by_role("button", name="Send answer").click()

        expect(answer).to_have_value("not lost")


def test_a_planned_stop_does_not_wait_for_open_pages(browser: Browser, mortal: Home) -> None:
    mortal.write_config(stop_grace_s=300.0)
    service, api = mortal.start()
    ask(api, "open-page")
    with browser.new_context(base_url=f"http://{mortal.settings['http_listen']}") as context:
        page = watched(context.new_page())
        with page.expect_response("**/live/**"):
            page.goto("/runs/open-page")

        assert service.stop() == 0

        expect(page.get_by_text("The service is away.")).to_be_visible()
    assert service.events("service.stop_step_failed") == []
