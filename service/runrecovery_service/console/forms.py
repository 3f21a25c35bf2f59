"""Reads the forms that pages send."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request

from runrecovery_service.http.asgi import BodyTooLarge, BodyTooSlow, read_body

MAX_FORM_BYTES: Final = 2 << 20
MAX_FIELDS: Final = 300
FORM_TYPE: Final = "application/x-www-form-urlencoded"


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form. Of a field that is sent twice the last one counts.

    Raises:
        HTTPException: the body is not a form, is too large or too slow, or has too many fields.
        ClientGone: the client closed the connection.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != FORM_TYPE:
        raise HTTPException(415, "Only forms are read here.")
    try:
        body = await read_body(request.scope, request.receive, limit=MAX_FORM_BYTES)
    except BodyTooLarge:
        raise HTTPException(413, "The form is too large.") from None
    except BodyTooSlow:
        raise HTTPException(408, "The form did not arrive in time.") from None
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict"
        )
    except ValueError:
        raise HTTPException(400, "The form cannot be read.") from None
    return dict(pairs)
