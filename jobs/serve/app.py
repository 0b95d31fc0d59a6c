"""The HTTP side: the page, limits, the token, and a status code for every fault."""

import asyncio
import base64
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from jobs.serve.replica import Answer, BusyError
from model.localization import RULES

PAGE = Path(__file__).with_name("page.html")
MOST_CONNECTIONS = 512
RETRY_SECONDS, LINGER_SECONDS = 2, 2
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; img-src blob: data:; connect-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
Ask = Callable[[bytes], Awaitable[Answer]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """image_bytes: of one upload; waiting_bytes: of all that are not answered yet. Seconds: for a
    request's header, for its body, and for the answer."""

    image_bytes: int
    waiting_bytes: int = 256 * 2**20
    header_seconds: float = 10
    body_seconds: float = 30
    answer_seconds: float = 60


class RefusedError(Exception):
    """A request that is answered with a status code and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Front:
    """Answers requests. ask: gives an image file to the nets. token: None where anybody may ask."""

    def __init__(self, ask: Ask, limits: Limits, token: str | None) -> None:
        self.ask, self.limits, self.token = ask, limits, token
        self.waiting_bytes = 0

    async def page(self, _: Request) -> Response:
        return HTMLResponse(PAGE.read_text(), headers=SECURITY)

    async def localize(self, request: Request) -> Response:
        """Answer POST /localize: an image file as the body; ?rule=NAME for another box rule,
        ?mask=1 for the mask as a PNG, in base64."""
        body = bytearray()
        try:
            self._check_token(request)
            rule, with_mask = _options(request)
            await self._read(request, body)
            content = await self._answer(bytes(body))
        except RefusedError as error:
            # A client that is still sending would see a broken connection and not the reason.
            # RuntimeError: nothing is left to read.
            with suppress(TimeoutError, ClientDisconnect, RuntimeError):
                async with asyncio.timeout(LINGER_SECONDS):
                    async for _ in request.stream():
                        pass
            headers = {"Connection": "close"}
            headers |= {"Retry-After": str(RETRY_SECONDS)} if error.status == 503 else {}
            return JSONResponse({"error": str(error)}, error.status, headers)
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads
        finally:
            self.waiting_bytes -= len(body)
        content["rule"] = rule or content["rule"]
        content["box"] = content["boxes"][content["rule"]]
        mask = content.pop("mask")
        if with_mask:
            content["mask"] = base64.b64encode(mask).decode()
        return JSONResponse(content)

    def _check_token(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.token and not secrets.compare_digest(given.encode(), self.token.encode()):
            raise RefusedError(401, "send the token: Authorization: Bearer TOKEN")

    async def _read(self, request: Request, body: bytearray) -> None:
        limits = self.limits
        too_large = RefusedError(413, f"an image may have up to {limits.image_bytes} bytes")
        if int(request.headers.get("content-length", 0)) > limits.image_bytes:
            raise too_large
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for part in request.stream():
                    body += part
                    self.waiting_bytes += len(part)
                    if len(body) > limits.image_bytes:
                        raise too_large
                    if self.waiting_bytes > limits.waiting_bytes:
                        raise RefusedError(503, "too many images are waiting; try again")
        except TimeoutError:
            reason = f"the image did not arrive within {limits.body_seconds:g} s"
            raise RefusedError(408, reason) from None
        if not body:
            raise RefusedError(400, "the body is empty; send an image file as the body")

    async def _answer(self, data: bytes) -> Answer:
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                content = await self.ask(data)
        except (BusyError, TimeoutError) as error:
            reason = str(error) or f"no answer within {self.limits.answer_seconds:g} s"
            raise RefusedError(503, f"{reason}; try again") from None
        if "error" in content:
            raise RefusedError(422, content["error"])
        return content


def _options(request: Request) -> tuple[str | None, bool]:
    """Return the box rule, None for the nets' own, and whether the mask is asked for."""
    allowed = {"rule": tuple(RULES), "mask": ("0", "1")}
    for name, value in request.query_params.items():
        if value not in allowed.get(name, ()):
            words = "; ".join(f"{key}: {', '.join(values)}" for key, values in allowed.items())
            raise RefusedError(400, f"{name}={value} is none of the options ({words})")
    return request.query_params.get("rule"), request.query_params.get("mask") == "1"


def make_server(ask: Ask, limits: Limits, token: str | None) -> uvicorn.Server:
    """Return a server that is given its sockets when it is run."""
    front = Front(ask, limits, token)
    routes = [Route("/", front.page), Route("/localize", front.localize, methods=["POST"])]

    class Protocol(H11Protocol):  # h11 bounds the header's size
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(limits.header_seconds, self.close_if_silent)

        def close_if_silent(self) -> None:
            if self.cycle is None:
                self.transport.close()

    config = uvicorn.Config(
        Starlette(routes=routes),
        http=Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="error",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    return uvicorn.Server(config)
