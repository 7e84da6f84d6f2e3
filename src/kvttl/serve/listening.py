"""A socket, its HTTP server, and who may connect: nothing here knows a KV cache."""

import gc
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anyio.from_thread import BlockingPortal

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY_VARIABLE = "KV_API_KEY"
_STOP_S = 3  # seconds that answers under way have to end
_STREAMS = 2_048  # connections that may wait to be accepted


def check_exposure(host: str, api_key: str | None) -> None:
    """Raise a ValueError where the network could use the server without a key."""
    if host not in LOOPBACK and not api_key:
        problem = f"host must be loopback ({', '.join(LOOPBACK)}) without an API key, got {host!r}"
        raise ValueError(f"{problem}: set {KEY_VARIABLE} or give --api-key-file")


@contextmanager
def serving(app: object, listener: socket.socket, loop: BlockingPortal) -> Iterator[str]:
    """Serve an application on a bound socket while the block runs; gives its URL."""
    import uvicorn

    options = {"log_config": None, "access_log": False, "backlog": _STREAMS}
    options |= {"http": _protocol(), "ws": "none"}
    settings = uvicorn.Config(app, timeout_graceful_shutdown=_STOP_S, **options)
    server = uvicorn.Server(settings)  # outside the main thread it leaves signals alone
    ended = loop.start_task_soon(server.serve, [listener])
    while not server.started:
        if ended.done():
            ended.result()
            raise RuntimeError("the HTTP server ended at its start")
        time.sleep(0.01)
    try:
        host, port = listener.getsockname()[:2]
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        server.should_exit = True
        ended.result()
        gc.unfreeze()  # vLLM froze it for speed; what stays frozen is reported as a leak at exit


def _protocol():
    """Return uvicorn's HTTP, whose answer to what is no HTTP is OpenAI's error too."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class JsonErrors(HttpToolsProtocol):
        def send_400_response(self, msg: str) -> None:
            error = {"message": msg, "type": "Bad Request", "param": None, "code": 400}
            super().send_400_response(json.dumps({"error": error}))

    return JsonErrors


@contextmanager
def listening(host: str = "127.0.0.1", port: int = 0) -> Iterator[socket.socket]:
    """Bind a socket for `serving`, before an engine is started in vain for a taken port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        yield listener


def read_key(file: Path | None, variable: str = KEY_VARIABLE) -> str | None:
    """Return the API key: the first line of a file, else an environment variable, else None.

    Raises
    ------
    ValueError
        The file has no key in its first line.
    OSError
        The file cannot be read.
    """
    if file is None:
        return os.environ.get(variable) or None
    key = file.read_text().partition("\n")[0].strip()
    if not key:
        raise ValueError(f"the first line of {file} must be the API key, it is empty")
    return key
