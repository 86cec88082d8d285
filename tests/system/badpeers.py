"""What a peer's address may lead to instead of a peer: silence, or a server that refuses."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading


class Silence:
    """Accepts every connection, takes what comes, and never answers."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.connections.append(self._listening.accept()[0])

    @property
    def asked(self) -> int:
        """How many connections were made."""
        return len(self.connections)

    def close(self) -> None:
        """End it, with all connections."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()
        for connection in self.connections:
            connection.close()


class Refusing:
    """An HTTP server that answers everything but greetings with one status."""

    def __init__(self, status: int, retry_after_s: int | None = None) -> None:
        refusing = self
        self.asked = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                refusing.asked += 1
                body = json.dumps({"title": "not today", "status": status, "code": "x"}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/problem+json")
                self.send_header("Content-Length", str(len(body)))
                if retry_after_s is not None:
                    self.send_header("Retry-After", str(retry_after_s))
                self.end_headers()
                self.wfile.write(body)

            do_PUT = do_POST  # named by http.server

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
