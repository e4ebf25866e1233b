"""The page's HTTP server: static files, what is known of the run, and predictions.

Nothing of a request is kept: an image comes in the body of a request, and its results leave in the answer. Every error
is JSON, {"error": one line}.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
import contextlib
import functools
import ipaddress
import json
import os
import pathlib
import re
import traceback
from typing import Any, NamedTuple

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from taskexpert_jax import images, report
from taskexpert_jax.app.line import Line
from taskexpert_jax.errors import UserError

PLACES = 8  # requests at once, uploads included
_UPLOAD_SECONDS = 120.0
_TICKET = re.compile(r"[0-9a-f]{32}")
_HERE = pathlib.Path(__file__).parent
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".png": "image/png"}
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Limits(NamedTuple):
    """Largest image that is accepted; megabytes: of the file."""

    megabytes: float

    @property
    def bytes(self) -> int:
        return int(self.megabytes * 1e6)

    def refusal(self) -> str:
        return (
            f"the file is larger than {self.megabytes:g} MB, the limit of this server: save it smaller, or start the "
            "server with a larger --max_upload"
        )


def build(
    predict: Callable[[bytes], bytes], about: Mapping[str, Any], limits: Limits, hosts: Collection[str] | None
) -> Starlette:
    """The application.

    Args:
      predict: bytes of an image file -> bytes of a ZIP file, see `answers.answer`; called in one thread.
      about: see `answers.about`.
      limits: of uploads.
      hosts: names and addresses that a request may have as its host; None: any. On a loopback address they keep pages
        of other sites, whose name resolves to it (DNS rebinding), from reading answers.
    """
    line = Line(PLACES)
    examples = _examples()
    shown = {
        **about,
        "limits": {"bytes": limits.bytes, "refusal": limits.refusal(), "formats": list(images.SUFFIXES)},
        "examples": list(examples),
    }
    routes = [
        Route("/run", functools.partial(_json, json.dumps(shown, allow_nan=False).encode())),
        Route("/predictions", functools.partial(_predict, line, predict, limits), methods=["POST"]),
        Route("/line/{ticket}", functools.partial(_position, line)),
    ]
    for path, (content, kind) in {**_static(), **examples}.items():
        routes.append(Route(f"/{path}", functools.partial(_file, content, kind)))
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={HTTPException: _http_error, ClientDisconnect: _nobody},
    )


def _static() -> dict[str, tuple[bytes, str]]:
    """The page's own files, by path; its style sheet begins with that of the reports."""
    found = {
        path.name: (path.read_bytes(), f"{_TYPES[path.suffix]}; charset=utf-8") for path in (_HERE / "static").iterdir()
    }
    base = (pathlib.Path(report.__file__).parent / "base.css").read_bytes()
    style, kind = found["page.css"]
    return {**found, "page.css": (base + style, kind), "": found["index.html"]}


def _examples() -> dict[str, tuple[bytes, str]]:
    return {
        f"examples/{path.name}": (path.read_bytes(), "image/png") for path in sorted((_HERE / "examples").iterdir())
    }


async def _file(content: bytes, kind: str, request: Request) -> Response:
    del request
    return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})


async def _json(content: bytes, request: Request) -> Response:
    del request
    return Response(content, media_type="application/json")


async def _position(line: Line, request: Request) -> Response:
    """Number of jobs before the one whose sender chose this ticket, which nobody else can guess."""
    return JSONResponse({"ahead": line.ahead(request.path_params["ticket"])})


async def _predict(line: Line, predict: Callable[[bytes], bytes], limits: Limits, request: Request) -> Response:
    """Results for the image in the request's body, as a ZIP file."""
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise HTTPException(403, "a page of another site cannot send images here")
    ticket = request.headers.get("x-ticket") or os.urandom(16).hex()
    if not _TICKET.fullmatch(ticket):
        raise HTTPException(400, "the header X-Ticket must be 32 hexadecimal digits")
    if not line.enter():
        raise HTTPException(503, "too many images are waiting: try again in a moment", {"Retry-After": "5"})
    try:
        data = await _body(request, limits)
        job = line.submit(ticket, functools.partial(predict, data))
        content = await _unless_gone(request, asyncio.wrap_future(job))
    except UserError as error:
        raise HTTPException(400, str(error)) from error
    except (HTTPException, ClientDisconnect):
        raise
    except Exception as error:
        logging.error("%s", traceback.format_exc().strip().replace("\n", "\n  "))
        raise HTTPException(500, "not predicted, because of an error in the server: its terminal shows it") from error
    finally:
        line.leave()
    return Response(content, media_type="application/zip")


async def _body(request: Request, limits: Limits) -> bytes:
    """The request's body; it is read no further than the limit."""
    data = bytearray()
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > limits.bytes:
        raise HTTPException(413, limits.refusal())
    try:
        async with asyncio.timeout(_UPLOAD_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > limits.bytes:
                    raise HTTPException(413, limits.refusal())
    except TimeoutError:
        raise HTTPException(408, f"the upload took more than {_UPLOAD_SECONDS:g} seconds: try a smaller file") from None
    if not data:
        raise HTTPException(400, "the request has no image: send the bytes of an image file as its body")
    return bytes(data)


async def _unless_gone(request: Request, job: asyncio.Future[bytes]) -> bytes:
    """The job's result; if the sender leaves before, the job is taken out of the line.

    Raises:
      ClientDisconnect: the sender has left.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.create_task(gone())
    try:
        await asyncio.wait({job, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            job.cancel()
            raise ClientDisconnect
        return job.result()
    finally:
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving


async def _http_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, error.headers)


async def _nobody(request: Request, error: Exception) -> Response:
    """The response to a sender who has left, which goes nowhere."""
    del request, error
    return Response(status_code=499)


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": text}, status, headers)


def policy(*, framed_by: str = "'none'") -> str:
    """The page's Content-Security-Policy: its own files only, no inline code; framed_by: sites that may embed it."""
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        f"base-uri 'none'; form-action 'none'; frame-ancestors {framed_by}"
    )


def host_name(header: str) -> str:
    """Name or address of a Host header, without port and brackets, in lower case."""
    found = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](?::\d*)?|([^:\[\]]*)(?::\d*)?", header.strip())
    return (found[1] or found[2] or "").lower().rstrip(".") if found else ""


def is_loopback(host: str) -> bool:
    """True if only this machine reaches a server on this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """Middleware: refuses hosts that are not ours, and adds the security headers to every response."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None):
        self._app = app
        self._hosts = hosts
        # Hugging Face shows a Space inside a page of its own site.
        space = policy(framed_by="https://huggingface.co") if "SPACE_ID" in os.environ else policy()
        self._headers = [
            (b"content-security-policy", space.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", b"same-origin"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [*message["headers"], *self._headers]
                if not any(name == b"cache-control" for name, _ in own):
                    own.append((b"cache-control", b"no-store"))
                message = {**message, "headers": own}
            await send(message)

        host = host_name(dict(scope["headers"]).get(b"host", b"").decode("latin-1"))
        if self._hosts is not None and host not in self._hosts:
            text = f"this server answers to {', '.join(sorted(self._hosts))} only; start it with --host to change that"
            await _error(421, text)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)
