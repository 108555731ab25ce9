"""The addresses of the server: who may ask, how much, and what becomes of a request when either side goes away.

Without a key the server answers only to this machine's own names in `Host`: a page in a browser could otherwise reach
a loopback address through a name of its own (DNS rebinding).
"""

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from distill.backends.live import Broken, Rejected
from distill.serve.admission import Admission, Full
from distill.serve.answers import Answers, Work, event, prepared, to_json
from distill.serve.choices import Delta
from distill.serve.metrics import Metrics
from distill.serve.requests import BadRequest, ChatRequest, CompletionRequest, Object, parse_chat, parse_completion

BODY_SECONDS = 60.0  # for the body of a request to arrive
GONE = 499  # the client went away
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(address: str) -> bool:
    """Whether an IP address reaches this machine only; False for a name, which may resolve to anything."""
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Limits:
    """request_bytes: size of a request's body. queue: requests that wait. per_client: requests of one client."""

    request_bytes: int = 16 << 20
    queue: int = 4096
    per_client: int = 1024


class Service:
    """Endpoints of one model. key: that requests must carry; None: no key. local: only this machine's names in `Host`.

    draining: set when the server is about to end; new requests are then refused.
    """

    def __init__(self, answers: Answers, key: str | None, limits: Limits, local: bool) -> None:
        self.answers, self._key, self._limits, self._local = answers, key, limits, local
        self.admission = Admission(2 * answers.live.capacity, limits.queue, limits.per_client)
        self.metrics = Metrics(lambda: self.admission.running, lambda: self.admission.waiting)
        self.draining = False
        self._started = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = (
            ("/v1/chat/completions", "chat", self._chat, "POST"),
            ("/v1/completions", "completions", self._completions, "POST"),
            ("/v1/models", "models", self._models, "GET"),
            ("/v1/models/{name:path}", "model", self._model, "GET"),
            ("/health", "health", self._health, "GET"),
            ("/metrics", "metrics", self._metrics, "GET"),
        )
        handlers: dict[int, Callable[[Request, Exception], Response]] = {404: _no_endpoint, 405: _no_endpoint}
        return Starlette(
            exception_handlers=handlers,
            routes=[
                Route(path, self._guarded(name, endpoint), methods=[method]) for path, name, endpoint, method in routes
            ],
        )

    def _guarded(
        self, name: str, endpoint: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint, with what is wrong with a request as the protocol's error objects."""

        async def answer(request: Request) -> Response:
            try:
                if name != "health":
                    self._check_client(request)
                response = await endpoint(request)
            except BadRequest as error:
                response = _error(error.status, error.message, error.param, error.code)
            except Rejected as error:
                response = _error(400, str(error), code="context_length_exceeded")
            except Full as error:
                status, code = (429, "rate_limit_exceeded") if error.own else (503, "overloaded")
                response = _error(status, f"{error}; try again later", code=code)
                response.headers["Retry-After"] = "1"
            except Broken as error:
                response = _error(500, str(error), code="engine_error")
            except (ClientDisconnect, TimeoutError):
                response = Response(status_code=GONE)
            self.metrics.answered(name, response.status_code)
            return response

        return answer

    def _check_client(self, request: Request) -> None:
        if self._key is None:
            host = request.headers.get("host", "").rpartition(":")
            name = host[0] if host[2].isdigit() else request.headers.get("host", "")
            if self._local and name not in LOCAL_NAMES and not is_loopback(name.strip("[]")):
                raise BadRequest(f"the host {name!r} is not this machine", code="invalid_host", status=403)
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key.encode()):
            raise BadRequest("the API key is missing or wrong", code="invalid_api_key", status=401)

    # ---- endpoints

    async def _chat(self, request: Request) -> Response:
        return await self._complete(request, parse_chat(await self._body(request)))

    async def _completions(self, request: Request) -> Response:
        return await self._complete(request, parse_completion(await self._body(request)))

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._about()]})

    async def _model(self, request: Request) -> Response:
        if (name := request.path_params["name"]) != self.answers.name:
            raise BadRequest(f"no model {name!r}; the model is {self.answers.name}", "model", "model_not_found", 404)
        return _json(self._about())

    async def _health(self, request: Request) -> Response:
        well = not (self.draining or self.answers.live.broken.is_set())
        return Response(status_code=200 if well else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": self.metrics.content_type})

    def _about(self) -> Object:
        return {
            "id": self.answers.name,
            "object": "model",
            "created": self._started,
            "owned_by": "distill",
            "max_model_len": self.answers.live.max_context,
        }

    async def _body(self, request: Request) -> bytes:
        """Errors: BadRequest for one that is too large; ClientDisconnect and TimeoutError."""
        parts, size, most = list[bytes](), 0, self._limits.request_bytes
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise BadRequest(f"the request has more than {most:,} bytes", code="request_too_large", status=413)
                parts.append(part)
        return b"".join(parts)

    async def _complete(self, request: Request, asked: ChatRequest | CompletionRequest) -> Response:
        if self.draining:
            raise Full(own=False)
        work = await prepared(self.answers, asked)
        client = request.client.host if request.client else "unknown"
        if asked.stream:
            events = self._events(work, client)
            await unless_gone(request.receive, anext(events))  # admitted: the status is known
            return _Events(events)
        return _json(await unless_gone(request.receive, self._whole(work, client)))

    async def _whole(self, work: Work, client: str) -> Object:
        with self.metrics.timed():
            async with self.admission.admitted(client, work.samples):
                answer, choices = await self.answers.whole(work)
        self._count(work, choices)
        return answer

    async def _events(self, work: Work, client: str) -> AsyncGenerator[bytes, None]:
        """Events of a streamed answer; an error in the middle is an event too."""
        ended = list[Delta]()
        tokens, counted = 0, True
        with self.metrics.timed() as first_token:
            try:
                async with self.admission.admitted(client, work.samples):
                    yield b""  # admitted
                    async with aclosing(self.answers.events(work)) as source:
                        async for part, delta in source:
                            if delta is not None:
                                first_token()
                                tokens += len(delta.token_ids)
                                ended += [delta] if delta.finish_reason else []
                            yield part
            except Full:
                counted = False
                raise
            except Rejected as error:
                yield event({"error": _problem(400, str(error), None, "context_length_exceeded")})
            except Broken as error:
                yield event({"error": _problem(500, str(error), None, "engine_error")})
            finally:
                if counted:
                    self.metrics.used(work.prompt_tokens, tokens, [delta.finish_reason or "" for delta in ended])

    def _count(self, work: Work, choices: list[Delta]) -> None:
        tokens = sum(len(choice.token_ids) for choice in choices)
        self.metrics.used(work.prompt_tokens, tokens, [choice.finish_reason or "" for choice in choices])


class _Events(Response):
    """Server-sent events. When the client goes away, the source is closed."""

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, until they or the client end."""
        with suppress(ClientDisconnect, OSError):
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._source) as source:
            async for part in source:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


T = TypeVar("T")


async def unless_gone(receive: Receive, work: Coroutine[object, object, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. Errors: ClientDisconnect; those of `work`."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


def _no_endpoint(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    return _error(status, f"no endpoint {request.method} {request.url.path}", code="unknown_endpoint")


def _json(value: Object, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


def _problem(status: int, message: str, param: str | None, code: str | None) -> Object:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": param, "code": code}


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    return _json({"error": _problem(status, message, param, code)}, status)
