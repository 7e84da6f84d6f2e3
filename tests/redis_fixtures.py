"""A real redis-server on a free loopback port, for the tests that need one."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import redis

START_TIMEOUT_S = 10.0
EC_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port < 55_000:  # a Cluster node wants the port 10,000 higher too
            return port


def make_tls(folder: Path) -> Path:
    """Write ca.crt, server.crt and server.key for 127.0.0.1 into a folder; return ca.crt."""
    folder = Path(folder)
    authority = f"req -x509 {EC_KEY} -keyout ca.key -out ca.crt -subj /CN=kit-test-ca"
    server = (
        f"req -x509 {EC_KEY} -CA ca.crt -CAkey ca.key -keyout server.key -out server.crt"
        " -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
        " -addext basicConstraints=critical,CA:FALSE"
    )
    for command in (authority + " -addext keyUsage=critical,keyCertSign", server):
        subprocess.run(
            ["openssl", *command.split()], cwd=folder, check=True, capture_output=True, timeout=30
        )
    return folder / "ca.crt"


def redis_url(port: int, password: str | None = None, tls_dir: Path | None = None) -> str:
    """Return the url of a server that ``start_redis`` started with the same arguments."""
    login = f":{password}@" if password else ""
    return f"{'rediss' if tls_dir else 'redis'}://{login}127.0.0.1:{port}/0"


def start_redis(
    port: int,
    password: str | None = None,
    tls_dir: Path | None = None,
    folder: str = "/tmp",
    options: Sequence[str] = (),
) -> subprocess.Popen:
    """Start redis-server on ``port`` and return it once it answers PING."""
    if shutil.which("redis-server") is None:
        raise RuntimeError("these tests need redis-server: apt-get install redis-server")
    command = ["redis-server", "--bind", "127.0.0.1", "--dir", folder, "--save", "", *options]
    if password:
        command += ["--requirepass", password]
    if tls_dir:
        command += ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"]
        for option, name in (("ca-cert", "ca.crt"), ("cert", "server.crt"), ("key", "server.key")):
            command += [f"--tls-{option}-file", str(Path(tls_dir) / name)]
    else:
        command += ["--port", str(port)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_for_ping(process, redis_url(port, password, tls_dir), tls_dir)
        except BaseException as error:
            stop_redis(process)
            if not isinstance(error, redis.RedisError):
                raise
            output.seek(0)
            raise RuntimeError(f"redis-server did not start: {output.read()[-2000:]}") from error
    return process


def _wait_for_ping(process: subprocess.Popen, url: str, tls_dir: Path | None) -> None:
    options = {"ssl_ca_certs": str(Path(tls_dir) / "ca.crt")} if tls_dir else {}
    deadline_s = time.monotonic() + START_TIMEOUT_S
    with redis.Redis.from_url(url, socket_timeout=1, **options) as client:
        while True:
            try:
                client.ping()
                return
            except redis.ConnectionError:
                # A server that could not bind its port is gone for good.
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.02)


def stop_redis(process: subprocess.Popen) -> None:
    """Stop a server that ``start_redis`` started; one that is gone already is no error."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)


@contextlib.contextmanager
def redis_server(
    password: str | None = None, tls_dir: Path | None = None, options: Sequence[str] = ()
) -> Iterator[str]:
    """Run a redis-server and give its url; with ``tls_dir``, over TLS.

    Certificates are made in ``tls_dir`` where they are missing; clients must be given
    ``ssl_ca_certs=tls_dir / "ca.crt"``.
    """
    if tls_dir and not (Path(tls_dir) / "server.crt").exists():
        make_tls(tls_dir)
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(3):  # another process may take the port before redis-server does
            port = free_port()
            try:
                process = start_redis(port, password, tls_dir, folder, options)
                break
            except RuntimeError as error:
                if attempt == 2 or "in use" not in str(error):
                    raise
        try:
            yield redis_url(port, password, tls_dir)
        finally:
            stop_redis(process)
