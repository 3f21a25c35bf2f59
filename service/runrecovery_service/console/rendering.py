"""Renders the templates."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

from runrecovery_service.console.bars import BAR_UNITS
from runrecovery_service.console.questions import Draft
from runrecovery_service.console.shown_text import is_shown_whole, shown, shown_line, shown_name
from runrecovery_service.console.visitors import FORM_FIELD, Visitor
from runrecovery_service.console.words import count

_FOLDER: Final = Path(__file__).parent
TEMPLATES: Final = _FOLDER / "templates"
STATIC: Final = _FOLDER / "static"

WHOLE_CHARS: Final = 2_000_000
"""The most characters of one text when the person asks to see all of it."""

# The texts that a page can show after a form was accepted. The address of the page names one.
NOTICES: Final = {
    "answered": "Your answer is recorded.",
    "canceled": "The cancel is recorded.",
    "reopened": "The run is open again.",
}


class Renderer:
    """Renders pages. Everything that a template inserts is escaped, or shown by `shown_text`."""

    def __init__(self) -> None:
        self._templates = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._templates.filters.update(shown=shown, line=shown_line, name=shown_name, count=count)
        self._templates.tests.update(shown_whole=is_shown_whole)
        self._templates.globals.update(
            bar_units=BAR_UNITS,
            form_field=FORM_FIELD,
            empty_draft=Draft(),
            whole_chars=WHOLE_CHARS,
        )

    def page(
        self, name: str, visitor: Visitor | None, status: int = 200, **values: object
    ) -> HTMLResponse:
        """Return a page.

        Args:
            name: the file name of the template, without its ending.
            visitor: None on pages for everyone, such as the login.
            values: the variables of the template. `live`: the address of the stream that reports
                changes of the page; empty: none. `version`: the version that the page shows.
                `page`: the address of the page; empty: that of the request.
        """
        given = {"live": "", "version": "", "page": "", "notice": "", "reload_s": 0} | values
        html = self._templates.get_template(f"{name}.html").render(visitor=visitor, **given)
        return HTMLResponse(html, status)
