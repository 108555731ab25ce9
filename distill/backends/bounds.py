"""A bound on the bytes of a reply, whatever the server says of its length."""

import json
from collections.abc import AsyncIterator

import httpx2


class TooLarge(Exception):
    """A reply that is longer than its bound, or may be."""


class _Bounded(httpx2.AsyncByteStream):
    """A reply's body, which ends with an error once it has more bytes than `most`."""

    def __init__(self, stream: httpx2.AsyncByteStream, most: int) -> None:
        self._stream, self._most = stream, most

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > self._most:
                raise TooLarge(f"its reply has more than {self._most:,} bytes")
            yield part

    async def aclose(self) -> None:
        """Close the connection's stream."""
        await self._stream.aclose()


async def bound(response: httpx2.Response, most: int, each: int = 0) -> None:
    """Let a response end with an error once its body has more than `most` bytes, and `each` for every sample that its
    request asks for. Errors: TooLarge, at once, where it is compressed."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise TooLarge("its reply is compressed, which was not accepted")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Bounded(response.stream, most + each * (_samples(response.request) if each else 0))


def _samples(request: httpx2.Request) -> int:
    """How many samples a chat request asks for. Its body says so: a request may be sent again with fewer."""
    n = json.loads(request.content).get("n")
    return n if isinstance(n, int) and n > 0 else 1
