"""A transport as another package would bring it: HTTP by hand over a Unix socket.

It is installed by the test of the conformance suite, never imported from here.
"""

from __future__ import annotations

import asyncio

from droprd.net.transport import Reply, Request, TransportError, TransportOptions
from droprd.testing.farend import read_pieces


class CarrierTransport:
    def __init__(self, options: TransportOptions) -> None:
        pass

    async def exchange(self, request: Request) -> Reply:
        body = read_pieces(request.pieces)
        try:
            reader, writer = await asyncio.open_unix_connection(
                request.url.removeprefix("carrier:")
            )
        except OSError as error:
            raise TransportError("connect", "the carrier found nobody", why=str(error)) from error
        head = [f"{request.method} {request.path} HTTP/1.1", "Host: carrier"]
        head += [f"{name}: {value}" for name, value in request.headers.items()]
        head += [f"Authorization: Bearer {request.token}", f"Content-Length: {len(body)}"]
        writer.write("\r\n".join([*head, "Connection: close", "", ""]).encode() + body)
        try:
            answer = await reader.read()
        finally:
            writer.close()
        head_bytes, _, answer_body = answer.partition(b"\r\n\r\n")
        status = int(head_bytes.split(b" ", 2)[1])
        return Reply(status, "application/msgpack", answer_body, bytes_sent=len(body))

    async def aclose(self) -> None:
        pass
