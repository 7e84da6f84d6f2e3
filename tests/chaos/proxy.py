"""A loopback HTTP proxy between a manager and LMCache that can drop, lose, cut and delay calls."""

from __future__ import annotations

import http.client
import random
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_UPSTREAM_LIMIT_S = 30.0
_HOP_HEADERS = {"connection", "content-length", "keep-alive", "transfer-encoding", "host", "date"}


class Proxy:
    """Passes every call on to ``127.0.0.1:port``, unless `trouble` says otherwise.

    Parameters
    ----------
    port : int
        Of the service behind.
    replaced : dict
        Texts of an answer -> what the manager gets to see instead: the other proxy's port.
    """

    def __init__(self, port: int, replaced: dict[str, str] | None = None) -> None:
        self.upstream_port, self.replaced = port, replaced or {}
        self.trouble, self.share, self.delay_s = "", 1.0, 0.0
        self.troubled = 0  # calls that the trouble has hit
        self._random = random.Random(0)
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True, name="proxy").start()

    def make_trouble(self, kind: str, share: float = 1.0, delay_s: float = 0.0, seed: int = 0):
        """Let a share of the calls be ``drop``ped, ``lose`` their answer, be ``cut`` or delayed."""
        self._random = random.Random(seed)
        self.share, self.delay_s, self.trouble, self.troubled = share, delay_s, kind, 0

    def drawn(self) -> str:
        """Return the trouble of the next call."""
        trouble = self.trouble
        if trouble and self._random.random() < self.share:
            self.troubled += 1
            return trouble
        return ""

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Say nothing of a manager that was killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def _pass_on(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        trouble = self.proxy.drawn()
        if trouble == "delay":
            time.sleep(self.proxy.delay_s)
        answer = None if trouble == "drop" else self._ask(body)
        if answer is None or trouble == "lose":
            self.close_connection = True
            return
        status, headers, content = answer
        with suppress(OSError):  # the manager has given up waiting
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in _HOP_HEADERS:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if trouble == "cut":
                content, self.close_connection = content[: len(content) // 2], True
            self.wfile.write(content)

    def _ask(self, body):
        upstream = http.client.HTTPConnection(
            "127.0.0.1", self.proxy.upstream_port, timeout=_UPSTREAM_LIMIT_S
        )
        headers = {n: v for n, v in self.headers.items() if n.lower() not in _HOP_HEADERS}
        try:
            upstream.request(self.command, self.path, body or None, headers)
            response = upstream.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            upstream.close()
        for old, new in self.proxy.replaced.items():
            content = content.replace(old.encode(), new.encode())
        return response.status, response.getheaders(), content

    do_GET = do_POST = do_DELETE = do_PUT = _pass_on

    def log_message(self, *_arguments):
        pass
