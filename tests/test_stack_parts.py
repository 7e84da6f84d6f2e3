"""The stack's settings, process records and directory corrections, without starting it."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import yaml

from kvttl.lmcache.client import get_json
from kvttl.lmcache.tiers import ChunkKey, parse_key
from kvttl.stack import child, reconcile
from kvttl.stack.disk_adapter import DiskAdapter
from kvttl.stack.lifecycle import StackConfig, StackError, load_config
from kvttl.stack.process import Child, load_state, save_state, spawn
from kvttl.stack.services import SERVICES, arguments_of, child_env, pick_ports

ROOT = Path(__file__).resolve().parent.parent


def wait_until(condition, timeout_s: float = 20.0) -> None:
    """Wait for `condition()`; the assertion fails if it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


# ---- settings ---------------------------------------------------------------

BAD_VALUES = {
    "host": ["0.0.0.0", "localhost", "", 5],
    "coordinator_port": [0, 65536, "9000", True, 9000.0],
    "server_port": [-1, None],
    "server_http_port": [70000],
    "redis_port": [0],
    "redis_url": ["http://h", "redis://", "redis://h:1/3", "redis://h?x=1", "redis://h:99999", 7],
    "instance_id": ["", "a b", "a@b", "x" * 65],
    "chunk_size_tokens": [0, 8193, 33, 32.0],
    "block_size_tokens": [0, 1025],
    "l1_size_gb": [0, 5000, float("nan"), float("inf"), "1"],
    "eviction_policy": ["lru", "MRU", None],
    "trigger_watermark": [0, 1.1, "0.9"],
    "eviction_ratio": [0, 2, None],
    "prefetch_policy": ["Retain", None],
    "redis_client": ["valkey", None],
    "disk_path": ["", 3, "a\0b"],
    "run_dir": [" ", None],
    "start_timeout_s": [0.5, 601],
    "stop_timeout_s": [0, 121],
    "mq_timeout_s": [0.4, 301],
    "engine_heartbeat_s": [0.1, 41],
    "registration_heartbeat_s": [0, 11],
    "event_flush_interval_s": [0, 11],
    "directory_checkpoint_s": [-1, 3601],
    "redis_connect_timeout_s": [0, 61],
    "redis_timeout_s": [0, "2"],
    "redis_retries": [-1, 11, 1.0],
    "redis_verify_s": [0, None],
    "inside": ["clever", 2, None],
    "meter": ["on", 1, None],
}


def test_every_setting_has_bad_values_below():
    assert set(BAD_VALUES) == set(StackConfig.model_fields)


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in BAD_VALUES.items() for v in vs])
def test_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        StackConfig(**{name: value})


def test_refusal_names_value_and_range():
    with pytest.raises(
        ValueError, match="l1_size_gb = 5000 is not allowed: a number from 0.001 to 4096"
    ):
        load_config(ROOT / "config.yaml", l1_size_gb=5000)
    with pytest.raises(ValueError, match="multiple of block_size_tokens = 32"):
        StackConfig(chunk_size_tokens=48)
    with pytest.raises(ValueError, match="server_port = 9000 .* coordinator_port has the same"):
        StackConfig(server_port=9000)


def test_shipped_config_is_complete_and_equals_the_defaults():
    section = yaml.safe_load((ROOT / "config.yaml").read_text())["stack"]
    assert section == {name: field.default for name, field in StackConfig.model_fields.items()}


def test_relative_folders_lie_beside_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("stack: {disk_path: ./d, run_dir: /abs/r}")
    config = load_config(tmp_path / "c.yaml")
    assert (config.disk_path, config.run_dir) == (str(tmp_path / "d"), "/abs/r")


@pytest.mark.parametrize(
    "text, message",
    [
        ("stack: {chunks: 3}", "unknown setting in stack: 'chunks': known are host"),
        (
            "stack: {redis_prot: 3}",
            "unknown setting in stack: 'redis_prot': did you mean 'redis_port'",
        ),
        ("stakc: {redis_port: 3}", "c.yaml: unknown section 'stakc': did you mean 'stack'"),
        ("stack: [1]", "mapping under stack"),
        ("- 1", "mapping under stack"),
        ("stack: {a: ", "not valid YAML"),
    ],
)
def test_bad_file_is_one_clear_error(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "c.yaml")


def test_missing_file_and_empty_section(tmp_path):
    with pytest.raises(ValueError, match="no.yaml' not found"):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "c.yaml").write_text("stack:\n")
    assert load_config(tmp_path / "c.yaml").coordinator_port == 9000


def test_redis_with_tls_takes_its_files_and_no_message_shows_the_password():
    url = "rediss://user:hunter2@example.org:7000"
    config = StackConfig(redis_url=url + "?ssl_ca_certs=ca.crt")
    assert config.redis_address == ("example.org", 7000) and "hunter2" not in repr(config)
    for end in ("/3", "?db=2", "?ssl_ca_certs=ca.crt&db=2", "#x"):
        with pytest.raises(ValueError, match="not allowed") as caught:
            StackConfig(redis_url=url + end)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match="options"):
        StackConfig(redis_url="redis://example.org?ssl_ca_certs=ca.crt")


def test_password_is_decoded_and_travels_outside_the_arguments():
    config = StackConfig(redis_url="redis://u%40x:p%3A%2Fw@h.example:7000")
    env = child_env(config)
    assert (env["LMCACHE_RESP_USERNAME"], env["LMCACHE_RESP_PASSWORD"]) == ("u@x", "p:/w")
    assert config.redis_address == ("h.example", 7000)
    assert not any("p:/w" in part or "p%3A" in part for part in arguments_of("server", config))


# ---- process records --------------------------------------------------------


def test_recycled_pid_is_never_touched(tmp_path):
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        record = Child("redis", bystander.pid, created_s=1.0, log_path=tmp_path / "x.log")
        assert not record.alive()
        record.stop(timeout_s=0.1)
        save_state(tmp_path / "stack.json", {"redis": record})
        assert load_state(tmp_path / "stack.json")[0] == {}
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_damaged_state_file_is_one_clear_error(tmp_path):
    (tmp_path / "stack.json").write_text('{"children": [{"pid":')
    with pytest.raises(StackError, match="damaged.*by hand"):
        load_state(tmp_path / "stack.json")


def test_deaf_child_and_grandchild_are_killed(tmp_path):
    """A group that ignores SIGTERM goes after the grace time, grandchildren included."""
    code = (
        "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "p = subprocess.Popen(['sleep', '60'], start_new_session=True); print(p.pid, flush=True);"
        "time.sleep(60)"
    )
    popen = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    grandchild = psutil.Process(int(popen.stdout.readline()))
    child = Child(
        "x", popen.pid, psutil.Process(popen.pid).create_time(), tmp_path / "x.log", popen
    )
    child.stop(timeout_s=0.3)
    assert popen.returncode == -signal.SIGKILL
    wait_until(lambda: not grandchild.is_running() or grandchild.status() == "zombie", 5)


def test_detached_child_outlives_its_starter(tmp_path):
    port = pick_ports("127.0.0.1", 1)[0]
    child = spawn(
        "redis", ["127.0.0.1", str(port)], tmp_path / "r.log", dict(os.environ), detached=True
    )
    try:  # owner 0: it minds nobody's end
        wait_until(lambda: psutil.Process(child.pid).cmdline()[4:6] == ["0", "redis"])
    finally:
        child.kill()
    wait_until(lambda: not child.alive())


# ---- directory correction ---------------------------------------------------


def test_names_that_are_no_chunks_are_ignored(tmp_path):
    assert parse_key("m@0x1@0@zz") is None
    assert parse_key("m@0x1@0@ab@salt") == ("m", 1, 0, "ab", "salt")
    assert reconcile.disk_contents(tmp_path / "none") == {}


def test_corrections_are_paged_and_minimal(monkeypatch):
    monkeypatch.setattr(reconcile, "PAGE_KEYS", 2)
    keys = [ChunkKey("m", 1, 0, f"{i:02x}", "") for i in range(6)]
    found = reconcile.corrections(set(keys[:2]), {k: 9 for k in keys[1:]})
    assert [(kind, len(rows)) for kind, rows in found] == [
        ("store", 2),
        ("store", 2),
        ("delete", 1),
    ]


def test_service_names_are_the_documented_ones():
    assert SERVICES == ("redis", "coordinator", "server")


def test_another_protocols_answer_is_no_coordinator(redis_url):
    """Redis answers HTTP with a line that no HTTP client understands."""
    from urllib.parse import urlsplit

    assert get_json(f"http://127.0.0.1:{urlsplit(redis_url).port}", "/openapi.json") == {}


# ---- what hangs on one version of LMCache ------------------------------------


def test_another_lmcache_is_refused_with_both_versions(monkeypatch):
    monkeypatch.setattr(child, "version", lambda _name: "0.6.0")
    with pytest.raises(RuntimeError, match=r"LMCache 0\.5\.6, but 0\.6\.0 is installed.*lmcache=="):
        child.install_adapters(own_redis_client=True)


def test_with_another_lmcache_and_its_own_redis_client_the_log_says_what_is_lost(
    monkeypatch, capsys
):
    monkeypatch.setattr(child, "version", lambda _name: "0.6.0")
    child.install_adapters(own_redis_client=False)
    assert capsys.readouterr().out == "damaged files are not found with LMCache 0.6.0\n"


def test_the_private_parts_of_lmcache_that_this_kit_uses_are_there():
    from lmcache.v1.distributed.api import ObjectKey
    from lmcache.v1.distributed.l2_adapters import (
        factory,
        fs_l2_adapter,
        native_connector_l2_adapter,
    )
    from lmcache.v1.internal_api_server.common import env_api

    assert version("lmcache") == child.LMCACHE_VERSION
    for name in ("resp", "fs"):
        factory.ensure_adapter_loaded(name)
        assert name in factory._L2_ADAPTER_FACTORY_REGISTRY
    overridden = {name for name in vars(DiskAdapter) if not name.startswith("__")}
    for name in overridden - {"verify", "_read_all", "_read", "_delete_damaged", "_report_gone"}:
        assert hasattr(fs_l2_adapter.FSL2Adapter, name), name
    adapter = native_connector_l2_adapter.NativeConnectorL2Adapter
    assert callable(adapter._notify_keys_stored) and callable(adapter._notify_keys_deleted)
    source = inspect.getsource(adapter)
    assert all(f"self.{name}" in source for name in ("_lock", "_key_sizes", "_client"))
    key = ObjectKey(b"\x00\xff", "org/model", 1, 0, "salt")
    name = native_connector_l2_adapter._object_key_to_string(key)
    assert parse_key(name) == ("org/model", 1, 0, "00ff", "salt")
    assert [route.path for route in env_api.router.routes] == ["/env"]
