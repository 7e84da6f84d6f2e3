"""What is wrong with a disk or a Redis is said before anything starts, in one line, by its cause.

All on real servers: every kind of Redis that is none for this kit, every kind of certificate.
"""

from __future__ import annotations

import errno
import http.server
import os
import re
import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from redis_fixtures import free_port, make_tls, redis_server
from waiting import wait_until

from kvttl.stack import commands, services
from kvttl.stack.config import StackConfig
from kvttl.stack.process import StackError
from kvttl.stack.reconcile import chunk_names
from kvttl.storage.probes import TierError, probe_folder, probe_redis, reason_of
from kvttl.storage.redis_client import checked_url, connect
from tiered_caching import RemoteBackend

PASSWORD = "s3cretword"


def what_is_wrong(url: str) -> str:
    """What the start of a stack says about a Redis; it is one line without the password."""
    with pytest.raises(StackError) as caught:
        services.check_redis(StackConfig(redis_url=url, redis_timeout_s=1.0))
    message = str(caught.value)
    assert "\n" not in message and PASSWORD not in message and "redis_url" in message
    assert message.startswith("Redis at 127.0.0.1:") or "localhost" in message
    return message


def is_fine(url: str) -> None:
    services.check_redis(StackConfig(redis_url=url))


def admin(url: str) -> redis.Redis:
    return redis.Redis.from_url(url)


# --- TLS ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """URL and folder of a Redis with TLS."""
    folder = tmp_path_factory.mktemp("tls")
    with redis_server(tls_dir=folder) as url:
        yield url.removesuffix("/0"), folder


def test_an_untrusted_certificate_is_named_with_the_option_that_helps(tls):
    url, folder = tls
    message = what_is_wrong(url)
    assert "certificate verify failed: self-signed certificate" in message
    assert "?ssl_ca_certs=<file>" in message
    is_fine(f"{url}?ssl_ca_certs={folder / 'ca.crt'}")


@pytest.mark.parametrize("value", ["none", "CERT_NONE", "NONE"])
def test_cert_reqs_is_read_as_other_clients_write_it(tls, value):
    is_fine(f"{tls[0]}?ssl_cert_reqs={value}")


def test_another_name_than_the_certificates(tls):
    url, folder = tls
    named = url.replace("127.0.0.1", "localhost") + f"?ssl_ca_certs={folder / 'ca.crt'}"
    message = what_is_wrong(named)
    assert "Hostname mismatch" in message and "ssl_check_hostname=false" in message
    is_fine(named + "&ssl_check_hostname=false")


def test_an_expired_certificate(tmp_path):
    make_tls(tmp_path)
    request = "req -new -key server.key -out server.csr -subj /CN=127.0.0.1"
    named = "subjectAltName=IP:127.0.0.1"
    signed = "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -out server.crt -days -1"
    for command in (f"{request} -addext {named}", f"{signed} -copy_extensions copyall"):
        done = ["openssl", *command.split()]
        subprocess.run(done, cwd=tmp_path, check=True, capture_output=True)
    port = free_port()
    files = {"cert": "server.crt", "key": "server.key", "ca-cert": "ca.crt"}
    command = ["redis-server", "--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"]
    for option, name in files.items():
        command += [f"--tls-{option}-file", str(tmp_path / name)]
    server = subprocess.Popen([*command, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        message = what_is_wrong(f"rediss://127.0.0.1:{port}?ssl_ca_certs={tmp_path / 'ca.crt'}")
        assert "certificate has expired" in message and "renew it" in message
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_a_file_that_is_not_there(tls, option):
    message = what_is_wrong(f"{tls[0]}?{option}=/no/such.pem")
    assert f"{option} = '/no/such.pem': this file does not exist" in message


def test_a_file_that_holds_no_certificate(tls):
    message = what_is_wrong(f"{tls[0]}?ssl_ca_certs={tls[1] / 'server.key'}")
    assert "no certificate or crl found" in message and "ssl_ca_certs" in message


def test_tls_to_a_plain_port_and_plain_to_a_tls_port(tls):
    assert "it speaks TLS: write rediss://" in what_is_wrong(tls[0].replace("rediss:", "redis:"))
    with redis_server(PASSWORD) as url:
        plain = url.removesuffix("/0")
        message = what_is_wrong(plain.replace("redis:", "rediss:") + "?ssl_cert_reqs=none")
        assert "does not speak TLS: write redis://" in message


# --- rights, states, kinds ------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain():
    """URL of a Redis with a password; tests leave it as they found it."""
    with redis_server(PASSWORD) as url:
        yield url.removesuffix("/0")


def with_login(url: str, login: str) -> str:
    return url.replace(f":{PASSWORD}@", login)


@pytest.mark.parametrize(
    ("login", "reason"),
    [
        ("", "it asks for a password"),
        (":wrong@", "it refused the user or password"),
        (f"nobody:{PASSWORD}@", "it refused the user or password"),
    ],
)
def test_logins(plain, login, reason):
    assert reason in what_is_wrong(with_login(plain, login))


@pytest.mark.parametrize("lacking", "ping set mget exists strlen scan del".split())
def test_a_user_who_may_not_do_all(plain, lacking):
    admin(plain).acl_setuser(
        "lim", enabled=True, passwords=["+x"], keys=["*"], commands=["+@all", f"-{lacking}"]
    )
    message = what_is_wrong(with_login(plain, "lim:x@"))
    assert f"'{lacking}'" in message.lower() and f"+{lacking} " in message
    assert admin(plain).dbsize() == (2 if lacking == "del" else 0)
    admin(plain).flushall()


def test_a_user_who_may_not_use_the_keys_and_one_who_needs_no_more(plain):
    client = admin(plain)
    may = "+ping +set +mget +exists +strlen +scan +del".split()
    client.acl_setuser("few", enabled=True, passwords=["+x"], keys=["a:*"], commands=may)
    assert "no permissions to access" in what_is_wrong(with_login(plain, "few:x@"))
    client.acl_setuser("few", enabled=True, passwords=["+x"], keys=["*@*"], commands=may)
    is_fine(with_login(plain, "few:x@"))


def test_nothing_is_left_of_it_and_lmcache_takes_it_for_no_chunk(plain):
    client, names = admin(plain), []
    with connect(plain) as seen:
        seen.delete = lambda *keys: names.extend(keys) or 2
        probe_redis(seen)
    assert len(names) == 2 and chunk_names(client) == []
    assert all(0 < client.pttl(name) <= 60_000 for name in names)  # gone, had the end failed
    client.delete(*names)
    is_fine(plain)
    assert client.dbsize() == 0


def test_full(plain):
    client = admin(plain)
    client.config_set("maxmemory", 1)
    try:
        assert "it is full: command not allowed when used memory" in what_is_wrong(plain)
    finally:
        client.config_set("maxmemory", 0)
    is_fine(plain)


def test_evicting_is_a_warning(plain, caplog):
    client = admin(plain)
    client.config_set("maxmemory-policy", "allkeys-lru")
    is_fine(plain)
    assert caplog.messages == []  # without a limit nothing is evicted
    client.config_set("maxmemory", "1gb")
    is_fine(plain)
    client.config_set("maxmemory", 0)
    client.config_set("maxmemory-policy", "noeviction")
    (said,) = caplog.messages
    assert "it evicts (maxmemory-policy allkeys-lru)" in said


@pytest.mark.parametrize("takes_writes", [False, True])
def test_a_replica(plain, takes_writes):
    client = admin(plain)
    client.config_set("replica-read-only", "no" if takes_writes else "yes")
    client.replicaof("127.0.0.1", "1")
    try:
        assert "it is a replica: give the address of the master" in what_is_wrong(plain)
    finally:
        client.replicaof("NO", "ONE")
        client.config_set("replica-read-only", "yes")


def test_one_that_could_not_save(tmp_path):
    port = free_port()
    options = ["--save", "3600 1", "--dbfilename", "dump"]
    with redis_server(options=[*options, "--port", str(port)]) as url:
        client = admin(url)
        folder = client.config_get("dir")["dir"]
        Path(folder, "dump").mkdir()  # renaming the new file to it fails
        client.set("a", 1)
        client.bgsave()
        wait_until(lambda: client.info()["rdb_last_bgsave_status"] == "err")
        assert "it could not save them (MISCONF)" in what_is_wrong(url)


@pytest.mark.parametrize("has_slots", [False, True])
def test_a_cluster_node(has_slots):
    with redis_server(options=["--cluster-enabled", "yes"]) as url:
        if has_slots:  # all of them: each key by itself could be written
            admin(url).execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
            wait_until(lambda: admin(url).cluster("info")["cluster_state"] == "ok")
        assert "a Redis Cluster, which is not supported" in what_is_wrong(url)


def test_a_sentinel(tmp_path):
    port, file = free_port(), tmp_path / "sentinel.conf"
    file.write_text(f"port {port}\nbind 127.0.0.1\n")
    command = ["redis-server", str(file), "--sentinel"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path)
    try:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        assert "a Sentinel, or a proxy" in what_is_wrong(f"redis://127.0.0.1:{port}")
    finally:
        server.kill()
        server.wait()


@contextmanager
def http_server():
    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_another_protocol(scheme):
    with http_server() as port:
        message = what_is_wrong(f"{scheme}://127.0.0.1:{port}")
        assert "what answers there is no Redis" in message


def test_nobody_there():
    message = what_is_wrong(f"redis://127.0.0.1:{free_port()}")
    assert "no Redis answers there (Connection refused)" in message
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        assert "no Redis answers there (Timeout" in what_is_wrong(url)


# --- URLs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("rediss://u:p@h?ssl_ca_cert=/x", "unknown option 'ssl_ca_cert': did you mean 'ssl_ca_ce"),
        ("rediss://h?ssl_certificate=1", "unknown option 'ssl_certificate': did you mean"),
        ("rediss://h?ssl_validate_ocsp=true", "unknown option 'ssl_validate_ocsp'"),
        ("rediss://h?ssl_cert_reqs=maybe", "'maybe' is not allowed: none, optional or required"),
        ("rediss://h?ssl_check_hostname=off", "'off' is not allowed: true or false"),
        ("rediss://h?ssl_min_version=TLSv1", "is not allowed: 771 (TLS 1.2)"),
        ("rediss://h?ssl_ca_certs=", "is not allowed: not empty"),
        ("redis-sentinel://s1:26379,s2:26379/mymaster", "Sentinel is not supported"),
        ("redis+sentinel://s1:26379/m", "Sentinel is not supported"),
        ("redis+cluster://s1:7000", "Cluster is not supported"),
        ("redis://s1:26379,s2:26379/mymaster", "a list of hosts: Sentinel and Cluster are not"),
        (f"redis://u:{PASSWORD}@a:1,b:2", "a list of hosts"),
        ("unix:///run/redis.sock", "scheme 'unix'; only redis[s]://"),
        ("127.0.0.1:6379", "no scheme; only redis[s]://"),
        ("localhost", "no scheme; only redis[s]://"),
        (f"u:{PASSWORD}@h", "no scheme"),
        ("http://h", "scheme 'http'; only"),
        ("redis://", "the host is missing"),
        ("redis://h:0", "the port must be 1 to 65535"),
        ("redis://h:6379:1", "the port must be 1 to 65535"),
        (f"redis://:{PASSWORD}#x@h", "must be percent-encoded"),
        (f"redis://:1?{PASSWORD}@h", "must be percent-encoded"),
        (f"redis://:{PASSWORD} x@h", "there is a space in it"),
        ("redis://h/2", "only database 0 works"),
        ("redis://h?ssl_ca_certs=x", "options after '?'"),
    ],
)
def test_urls_that_cannot_be_used(url, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        StackConfig(redis_url=url)
    message = str(caught.value)
    assert message.startswith("redis_url is not allowed: ") and "\n" not in message
    assert PASSWORD not in message


@pytest.mark.parametrize("url", [" redis://h:1", "REDIS://h:1 ", "Redis://h:1\n"])
def test_urls_that_people_paste(url):
    assert StackConfig(redis_url=url).redis_url == "redis://h:1"


def test_options_with_a_url_stay_as_they_were_given():
    url = "rediss://u%40:p%2F@h:1/0?ssl_ca_certs=/a b/c.pem".replace(" ", "%20")
    assert checked_url(url) == url


def test_a_backend_says_the_same(tls, plain):
    with pytest.raises(ValueError, match="did you mean 'ssl_ca_certs'"):
        RemoteBackend(tls[0] + "?ssl_ca_cert=/x")
    with pytest.raises(ConnectionError, match="certificate verify failed.*ssl_ca_certs=<file>"):
        RemoteBackend(tls[0]).get("key")
    with pytest.raises(ConnectionError, match="it refused the user or password"):
        RemoteBackend(with_login(plain, ":x@")).set("key", 1, 60)
    limits = StackConfig(redis_timeout_s=0.7, redis_retries=3).redis_limits
    options = RemoteBackend(plain, limits=limits)._client.connection_pool.connection_kwargs
    assert (options["socket_timeout"], options["retry"]._retries) == (0.7, 3)


# --- disk -----------------------------------------------------------------------------------


def test_a_folder_is_made_tried_and_left_as_it_was(tmp_path):
    probe_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file", "it is a file, not a folder"),
        ("file/below", "Not a directory"),
        ("/proc/kvttl", "No such file or directory"),  # a file system that takes no files
    ],
)
def test_a_place_that_takes_no_files(tmp_path, place, reason):
    (tmp_path / "file").touch()
    for field in ("disk_path", "run_dir"):
        config = StackConfig(**{"disk_path": str(tmp_path), "run_dir": str(tmp_path)})
        config = config.replaced(**{field: str(tmp_path / place)})
        with pytest.raises(StackError, match=f"{field} = .*{reason}"):
            services.check_folders(config)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_what_the_system_says_is_the_cause(tmp_path, monkeypatch, code):
    """Root may write everywhere, and no test may fill a disk: the system's answer is made up."""

    def fsync(_descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TierError, match=os.strerror(code)):
        probe_folder(tmp_path)
    assert os.listdir(tmp_path) == []


def test_too_little_space(tmp_path, monkeypatch):
    left = shutil.disk_usage(tmp_path)._replace(free=3 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: left)
    with pytest.raises(TierError, match="the disk is full: 3.0 MiB free, at least 16 MiB"):
        probe_folder(tmp_path)


def test_a_failing_tier_stops_the_start_before_anything_runs(tmp_path, capsys):
    (tmp_path / "disk").touch()
    (tmp_path / "c.yaml").write_text("stack: {disk_path: disk, run_dir: run}")
    assert commands.main(["up", "--free-ports", "--config", str(tmp_path / "c.yaml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: disk_path = '{tmp_path / 'disk'}': it is a file, not a folder"


def test_reasons_without_a_known_cause_are_the_text():
    with connect("redis://127.0.0.1:1") as client:
        assert reason_of(redis.ResponseError("ERR what\n ever"), client) == "ERR what ever"
