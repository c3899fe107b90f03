"""GET /metrics and GET /ready of a sidecar, on a port of their own: what Prometheus and load balancers ask.

One request per connection, no body: a framework would be larger than all of it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from http import HTTPStatus

_log = logging.getLogger(__name__)

_REQUEST_SECONDS = 5.0
_LONGEST_REQUEST = 8192  # bytes

# Path -> what answers: status, content type, body.
Pages = dict[str, Callable[[], tuple[HTTPStatus, str, bytes]]]


class HttpPages:
    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """For asyncio.start_server. Never raises."""
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                writer.write(self._response(await _request_line(reader)))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError):
            writer.transport.abort()

    def _response(self, request: list[str]) -> bytes:
        method, path = request[:2] if len(request) == 3 else ("", "")
        page = self._pages.get(path.partition("?")[0])
        status, kind, body = HTTPStatus.OK, "text/plain; charset=utf-8", b""
        if not method:
            status = HTTPStatus.BAD_REQUEST
        elif page is None:
            status, body = HTTPStatus.NOT_FOUND, f"here are {' and '.join(self._pages)}\n".encode()
        elif method not in ("GET", "HEAD"):
            status = HTTPStatus.METHOD_NOT_ALLOWED
        else:
            status, kind, body = _made(page)
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"Connection: close\r\n\r\n" + (b"" if method == "HEAD" else body)


def _made(page: Callable[[], tuple[HTTPStatus, str, bytes]]) -> tuple[HTTPStatus, str, bytes]:
    try:
        return page()
    except Exception:  # noqa: BLE001  # logged; the sidecar goes on without this page
        _log.exception("a page could not be made")
        return HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", b""


async def _request_line(reader: asyncio.StreamReader) -> list[str]:
    """Method, path, version; anything else where the request is none."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return []
    return head.partition(b"\r\n")[0].decode("ascii", "replace").split(" ")


async def serve_pages(pages: Pages, listener: socket.socket) -> asyncio.Server:
    return await asyncio.start_server(HttpPages(pages).answer, sock=listener, limit=_LONGEST_REQUEST)
