"""Every setting has its documented effect at every entry, or is refused by name.

Settings are config.yaml's, the Makefile's and `vllm serve`'s. The commands run for real up to the
moment at which a stack would start; `tests/test_gateway.py` starts one of them with its options.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvttl.bench import contenders, overhead, speedup
from kvttl.bench import gateway as bench_gateway
from kvttl.serve import gateway, options
from kvttl.serve.vllm_parts import vllm_parts
from kvttl.session import launch, run, show_start
from kvttl.stack import commands, lifecycle
from kvttl.stack.config import (
    PORT_FIELDS,
    StackConfig,
    kv_transfer_config,
    load_config,
    overrides_of,
)
from kvttl.stack.process import StackError
from kvttl.stack.services import SERVICES, arguments_of, child_env

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()

# A valid value beside the default, for each setting. `host` has one value only.
OTHER = {
    "coordinator_port": 19_101,
    "server_port": 19_102,
    "server_http_port": 19_103,
    "redis_port": 19_104,
    "redis_url": "rediss://u:p@redis.example:19105?ssl_cert_reqs=none",
    "redis_client": "lmcache",
    "redis_connect_timeout_s": 0.21,
    "redis_timeout_s": 0.22,
    "redis_retries": 7,
    "redis_verify_s": 0.23,
    "instance_id": "another",
    "chunk_size_tokens": 96,
    "block_size_tokens": 16,
    "l1_size_gb": 0.24,
    "eviction_policy": "noop",
    "trigger_watermark": 0.91,
    "eviction_ratio": 0.07,
    "prefetch_policy": "retain",
    "disk_path": "elsewhere",
    "run_dir": "run-elsewhere",
    "start_timeout_s": 61.5,
    "stop_timeout_s": 1.25,
    "mq_timeout_s": 1.26,
    "engine_heartbeat_s": 1.27,
    "registration_heartbeat_s": 1.28,
    "event_flush_interval_s": 0.0129,
    "directory_checkpoint_s": 1.3,
    "inside": False,
    "meter": False,
}
# What an entry has of its own, and says so by name; everything else it takes from config.yaml.
OF_A_SESSION = set(PORT_FIELDS)
OF_THE_BENCHMARK = OF_A_SESSION | {
    "redis_url", "redis_client", "prefetch_policy", "l1_size_gb", "chunk_size_tokens",
    "block_size_tokens", "trigger_watermark", "eviction_ratio", "inside",
}  # fmt: skip
ENTRIES = {
    "make up": (lambda file: commands.main(["up", "--config", file]), set()),
    "make serve": (lambda file: gateway.main(["--config", file, "--port", "0"]), set()),
    "make run": (lambda file: run.main(["--config", file]), OF_A_SESSION),
    "make bench-overhead": (lambda file: overhead.main(["--config", file]), OF_A_SESSION),
    "make bench-gateway": (lambda file: bench_gateway.main(["--config", file]), OF_A_SESSION),
    "notebooks": (lambda file: launch.session_stack(file).__enter__(), OF_A_SESSION),
    "make bench": (lambda file: speedup.main(["--config", file, "--quick"]), OF_THE_BENCHMARK),
}


def test_every_setting_and_every_entry_is_walked():
    assert set(OTHER) == set(StackConfig.model_fields) - {"host"}
    reads_config = {
        f"make {target}"
        for target, recipe in recipes().items()
        if "--config" in recipe and target not in ("down", "status", "show-start")
    }
    assert reads_config | {"notebooks"} == set(ENTRIES)


@pytest.fixture
def stacks(monkeypatch):
    """The settings of the stacks that a command would start."""
    seen = []

    def start(self):
        self.choose_ports()
        seen.append(self.config)
        raise StackError("as far as this test goes")

    monkeypatch.setattr(lifecycle.LMCacheStack, "start", start)
    monkeypatch.setattr(overhead, "decision_costs", dict)
    monkeypatch.setattr(speedup, "bench_settings", lambda *_: ({}, ""))
    monkeypatch.setattr(speedup.BenchPlan, "workloads", lambda *_: {("agentic", 0): WORKLOAD})
    return seen


WORKLOAD = argparse.Namespace(working_set_tokens=10_000)


@pytest.mark.parametrize("entry", ENTRIES)
def test_config_yaml_is_used_or_what_is_not_is_named(entry, stacks, tmp_path, capsys, monkeypatch):
    start, own = ENTRIES[entry]
    values = OTHER | ({"redis_client": "kit"} if "redis_client" not in own else {})
    if "redis_client" in own:  # LMCache's own client has no TLS
        values |= {"redis_url": "redis://redis.example:19105"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"stack": values}))
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(StackError):
        start(str(tmp_path / "config.yaml"))
    said, config = capsys.readouterr().err, stacks[0]
    for name, value in values.items():
        got = getattr(config, name)
        if name in own:
            assert any(getattr(each, name) != value for each in stacks), name
            assert re.search(rf"config.yaml: .*\b{name}\b.* not used", said), name
        elif name in ("disk_path", "run_dir"):
            folder = tmp_path / value  # a session has a folder of its own in it
            assert Path(got) == folder if not own else Path(got).parent == folder, name
        else:
            assert got == value, name
    assert not any((tmp_path / "elsewhere").glob("*")), "the session's folder stays behind"


@pytest.mark.parametrize("entry", ENTRIES)
def test_nothing_is_said_of_settings_that_nobody_has_changed(entry, stacks, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("stack: {disk_path: d, run_dir: r}")
    with contextlib.suppress(StackError):
        ENTRIES[entry][0](str(tmp_path / "config.yaml"))
    assert stacks and "not used" not in capsys.readouterr().err


# How a setting acts once it is the stack's: in what is started, or in how it is waited for.
IN_THE_STACK_ITSELF = {"run_dir", "start_timeout_s", "stop_timeout_s", "redis_port"}
IN_THE_STACK_ITSELF |= {"meter"}  # of a manager; inside, of the module: see below


def started_with(config: StackConfig) -> str:
    """All command lines, the environment and the engine's connector."""
    lines = [arguments_of(name, config) for name in SERVICES]
    return json.dumps([lines, child_env(config), vars(kv_transfer_config(config))], default=str)


@pytest.mark.parametrize("name", sorted(OTHER))
def test_a_setting_changes_what_is_started(name):
    value = OTHER[name]
    if name == "block_size_tokens":
        kwargs = lifecycle.engine_kwargs(StackConfig(block_size_tokens=value), "model")
        assert kwargs["block_size"] == value
        return
    outside = StackConfig(inside=False)  # inside the two of eviction are the module's, see below
    value = True if name == "inside" else value
    with_it, without = started_with(outside.replaced(**{name: value})), started_with(outside)
    new = set(re.findall(r"[^\s\"',{}]+", with_it)) - set(re.findall(r"[^\s\"',{}]+", without))
    wanted = f"{value:g}" if isinstance(value, float) else str(value)
    wanted = "--server-module" if name == "inside" else wanted
    assert any(wanted in word for word in new) or name in IN_THE_STACK_ITSELF, name
    if name == "redis_url":
        assert "redis.example" in with_it and "19105" in with_it


def test_inside_the_module_has_the_same_rules_of_room(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("base_ttl: 77")
    monkeypatch.setenv("KV_HEURISTICS_FILE", str(tmp_path / "mine.yaml"))
    rules = {"trigger_watermark": 0.8, "eviction_ratio": 0.25, "prefetch_policy": "retain"}
    arguments = arguments_of("server", StackConfig(inside=True, **rules))
    module = json.loads(arguments[arguments.index("--server-module") + 1])
    assert module["module_path"] == "kvttl.server"
    assert module["config"] == {"high": 0.8, "low": 0.6, "heuristics": {"base_ttl": 77.0}}
    assert arguments[arguments.index("--l2-prefetch-policy") + 1] == "retain"
    assert "--l2-prefetch-policy" not in arguments_of("server", StackConfig(inside=True))
    silent = arguments_of("server", StackConfig(inside=True, meter=False))
    assert '"meter": false' in silent[silent.index("--server-module") + 1]
    learns = arguments_of("server", StackConfig(inside="adaptive"))
    assert '"policy": "adaptive"' in learns[learns.index("--server-module") + 1]
    by_file = {}
    for value in (True, False, "recency"):
        by_file[value] = file = tmp_path / f"{value}.yaml"
        file.write_text(yaml.safe_dump({"stack": {"inside": value}}))
    for file, inside, policy, given in (
        *((file, "adaptive", "formula", "adaptive") for file in by_file.values()),
        *((file, "1", "adaptive", "adaptive") for file in by_file.values()),
        *((file, "1", "formula", True) for file in by_file.values()),
        *((file, "0", "adaptive", False) for file in by_file.values()),
        (by_file[True], None, "adaptive", "adaptive"),  # of the one that decides by default
    ):
        assert overrides_of(file, inside, policy=policy) == {"inside": given}
    for value in (False, "recency"):  # what the file says is not changed by a policy
        assert overrides_of(by_file[value], None, policy="adaptive") == {}
    assert overrides_of(by_file[True], None) == {}
    with pytest.raises(ValueError, match="inside = 'clever' is not allowed: true, false or one of"):
        StackConfig(inside="clever")
    with pytest.raises(ValueError, match="eviction_policy = 'ARC' is not allowed: LRU or noop"):
        StackConfig(inside=True, eviction_policy="ARC")


@pytest.mark.parametrize("name", sorted(OTHER.keys() - {"inside", "run_dir"}))
def test_a_setting_changes_what_show_start_prints_or_is_named(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = "redis://redis.example:19105" if name == "redis_url" else OTHER[name]
    printed = []
    for settings in ({}, {name: value}):
        Path("config.yaml").write_text(yaml.safe_dump({"stack": settings}))
        assert show_start.main(["--llm", str(ROOT / "data" / "demo_model")]) == 0
        printed.append(capsys.readouterr())
    (plain, said), (text, notice) = printed
    assert said == "" and (text != plain) == (f"config.yaml: {name} not used" not in notice)


def test_settings_of_the_stack_itself(tmp_path, monkeypatch):
    waits, places = [], []

    def spawn(name, arguments, log_path, *_):
        places.append((name, arguments, log_path))
        log = {"log_path": log_path, "last_lines": lambda _count: []}
        return argparse.Namespace(
            stop=waits.append, alive=lambda: True, listens_on=lambda _p: False, **log
        )

    times = iter(range(0, 10_000, 50))
    monkeypatch.setattr(lifecycle, "spawn", spawn)
    monkeypatch.setattr(lifecycle.time, "monotonic", lambda: float(next(times)))
    config = load_config(
        ROOT / "config.yaml",
        **OTHER | {"redis_url": None, "redis_client": "kit"},
    ).replaced(run_dir=str(tmp_path / "run"), disk_path=str(tmp_path / "disk"))
    with pytest.raises(StackError, match=r"not ready after 61.5 s \(start_timeout_s\)"):
        lifecycle.LMCacheStack(config).start()
    assert set(waits) == {1.25}
    assert {log.parent for *_, log in places} == {tmp_path / "run"}
    assert ["127.0.0.1", "19104"] in [arguments for name, arguments, _ in places]


def test_the_documents_table_says_the_same():
    text = (ROOT / "docs" / "lmcache.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in text.partition("## Settings")[2].partition("\n## ")[0].splitlines()
        if line.startswith("| `")
    ]
    documented = {name: cells for names, *cells in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(documented) == set(StackConfig.model_fields)
    columns = ("make up", "make serve", "make run", "make bench")
    for name, cells in documented.items():
        for entry, cell in zip(columns, cells, strict=True):
            assert cell.startswith("own") == (name in ENTRIES[entry][1]), (name, entry)


# --- the Makefile ---------------------------------------------------------------------------

VARIABLES = {  # of make, each with a value that no recipe has by itself
    "CONFIG": "other.yaml", "INSIDE": "1", "LLM": "some/model", "REDIS_URL": "redis://h:7",
    "N": "4711", "SEED": "4712", "METRICS_PORT": "4713", "PERPLEXITY": "generation", "HOST": "::1",
    "PORT": "4714", "LOG": "some/log", "ATTACH": "1", "API_KEY_ENV": "SOME_KEY", "QUICK": "1",
    "OPTIONS": "--seed 4715", "TRACE": "some.jsonl", "POLICY": "fifo", "CAPACITY": "4716",
    "SET": "alpha=0.4717", "SKIP_BAD": "1",
    "FORMAT": "mooncake", "BLOCK_TOKENS": "4718", "TIME_UNIT": "ms", "SUBAGENT_TIMES": "relative",
    "TARIFF": "some.yaml", "MODEL": "some/config.json", "OUTPUT_RATE": "4723",
    "GOAL": "ttft", "AGAINST": "bytes", "LIMIT": "0.4719", "TRIALS": "4720", "SPLIT": "0.4721",
    "PRICES": "0.4722 1 2 3",
}  # fmt: skip
SWITCHES = {"ATTACH": "--attach", "QUICK": "--quick", "SKIP_BAD": "--skip-bad"}
SWITCHES |= {"INSIDE": "--inside '1'"}
SWITCHES |= {"OPTIONS": '--server-options="$OPTIONS"'}  # the shell's, so that quotes stay


def make(*arguments: str) -> subprocess.CompletedProcess:
    command = ["make", "-n", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def recipes() -> dict[str, str]:
    """Target -> its recipe, with what several of them share in place."""
    found = re.findall(r"^([a-z-]+):[^=\n]*##[^\n]*\n((?:\t.*\n)*)", MAKEFILE, re.M)
    (shared,) = re.findall(r"^ON_TRACE = (.*\n(?:\t.*\n)*)", MAKEFILE, re.M)
    return {target: recipe.replace("$(ON_TRACE)", shared) for target, recipe in found}


def taken_by(target: str) -> set[str]:
    return set(re.findall(rf"^TAKES_{target} := (.*)", MAKEFILE, re.M)[0].split()) if re.search(
        rf"^TAKES_{target} :=", MAKEFILE, re.M
    ) else set()  # fmt: skip


def test_every_variable_that_a_recipe_uses_is_taken_and_the_other_way_round():
    inner = {"PY", "VENV", "READY", "AGENTS", "VOILA", "LAB", "MAKEFILE_LIST"}
    assert set(recipes()) >= {"run", "serve", "replay", "clean"}
    for target, recipe in recipes().items():
        used = set(re.findall(r"\$\(([A-Z_]+)\)", recipe)) - inner
        used |= set(re.findall(r"\$\((?:if|or) \$\(([A-Z_]+)\)", recipe))
        assert used == taken_by(target), target
    named = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.M)) - {"PYTHON", "TORCH_CPU_INDEX"}
    assert named <= set().union(*map(taken_by, recipes())) == set(VARIABLES)


@pytest.mark.parametrize("target", recipes())
def test_a_make_variable_reaches_the_command_or_is_refused(target):
    taken = taken_by(target)
    given = [f"{name}={VARIABLES[name]}" for name in sorted(taken & set(VARIABLES))]
    command = make(target, *given)
    assert command.returncode == 0, command.stderr
    for name in taken & set(VARIABLES):
        assert SWITCHES.get(name, VARIABLES[name]) in command.stdout, name
    for name in sorted(set(VARIABLES) - taken):
        refused = make(target, f"{name}=x")
        assert refused.returncode == 2, name
        assert f"make {target} does not use {name}; it takes" in refused.stderr


def test_a_misspelt_variable_and_one_that_another_target_uses():
    assert "does not use LMM; it takes CONFIG LLM" in make("run", "LMM=x").stderr
    assert make("install", "run", "N=3").returncode == 0
    assert "make help does not use PORT; it takes no variables" in make("PORT=3").stderr


@pytest.mark.parametrize(
    "module", [gateway, run, speedup, overhead, bench_gateway, commands, show_start]
)
def test_every_option_of_a_command_is_read(module):
    tree = ast.parse(inspect.getsource(module))
    added = [
        next((k.value.value for k in node.keywords if k.arg == "dest"), node.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
    ]
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    read |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert added
    for name in added:
        assert name.lstrip("-").replace("-", "_") in read, name


# --- options of vllm serve --------------------------------------------------------------------


def actions() -> dict[str, argparse.Action]:
    parser = vllm_parts().make_arg_parser(vllm_parts().FlexibleArgumentParser())
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def test_the_options_that_are_passed_on_exist_and_go_where_they_are_read():
    engine = {field.name for field in dataclasses.fields(vllm_parts().AsyncEngineArgs)}
    assert options._ENGINE <= engine & set(actions())
    assert options._SERVER <= set(actions()) - engine


def arguments_for(action: argparse.Action) -> list[str]:
    """Some valid use of an option, or at least one that is taken for it."""
    if action.nargs == 0 or "--no-" in " ".join(action.option_strings):
        return [action.option_strings[0]]
    if action.choices:
        return [action.option_strings[0], str(list(action.choices)[-1])]
    kind = str(getattr(action.type, "__qualname__", action.type)).lower()
    text = "{}" if "json" in kind or "dict" in kind or "loads" in kind else "1"
    return [action.option_strings[0], text]


def test_every_other_option_is_refused_by_its_name_with_a_reason():
    for name, action in actions().items():
        if name in options._ENGINE | options._SERVER | {"config"}:  # a file of more of them
            continue
        given = arguments_for(action) if action.option_strings else ["some/model"]
        with pytest.raises(ValueError) as caught:
            options.read_options(given)
        assert options._option(name) in str(caught.value), (name, str(caught.value))


def test_a_file_of_options_is_read_as_if_they_were_given(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("max-model-len: 512\nenable-lora: true\n")
    given = options.read_options(["--config", str(file), "--seed", "7"])
    assert given == {"max_model_len": 512, "enable_lora": True, "seed": 7}
    file.write_text("port: 1")
    with pytest.raises(ValueError, match="^--port is not possible here"):
        options.read_options(["--config", str(file)])


def test_the_kits_own_ways_are_named():
    ways = {"--port": "PORT=", "--host": "HOST=", "--api-key": "KV_API_KEY", "--model": "LLM="}
    ways |= {"--block-size": "block_size_tokens", "--kv-transfer-config": "config.yaml's stack"}
    ways |= {"--dtype": "KV cache would differ", "--tensor-parallel-size": "one rank"}
    for option, way in ways.items():
        value = {"--kv-transfer-config": "{}", "--dtype": "float16"}.get(option, "1")
        with pytest.raises(ValueError, match=f"^{option} is not possible here: .*{re.escape(way)}"):
            options.read_options([option, value])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--max-modl-len 5", "unknown server option '--max-modl-len': did you mean '--max-model-"),
        ("--max-model-len five", "--max-model-len: invalid"),
        ("--tool-call-parser hermse", "did you mean 'hermes'"),
        ("--reasoning-parser nobody", "unknown --reasoning-parser 'nobody'"),
        ("--enable-auto-tool-choice", "--enable-auto-tool-choice requires --tool-call-parser"),
        ("--lora-modules a=b", "--lora-modules needs --enable-lora"),
        ("some/model", "--model-tag is not possible here: LLM="),
    ],
)
def test_wrong_options_are_one_line(given, message, capsys):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        options.server_arguments("data/demo_model", "demo", options=shlex.split(given))
    assert "\n" not in str(caught.value) and capsys.readouterr().err == ""


def test_wrong_options_end_the_command_before_a_stack_starts(stacks, capsys):
    assert gateway.main(["--port", "0", "--server-options=--max-modl-len 5"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: unknown server option")
    assert stacks == []


def test_engine_and_server_get_theirs():
    given = shlex.split("--max-model-len 512 --enable-lora --lora-modules a=x --max-loras=2")
    assert options.options_of_engine(given) == {
        "max_model_len": 512, "enable_lora": True, "max_loras": 2,
    }  # fmt: skip
    more = ["--reasoning-parser", "deepseek_r1", "--tool-call-parser", "hermes"]
    arguments = options.server_arguments("data/demo_model", "demo", "key", [*given, *more])
    assert [module.name for module in arguments.lora_modules] == ["a"]
    assert (arguments.tool_call_parser, arguments.api_key) == ("hermes", ["key"])
    assert arguments.structured_outputs_config.reasoning_parser == "deepseek_r1"
    by_python = options.server_arguments(
        "data/demo_model", "demo", options=["--lora-modules", "a=x"], engine={"enable_lora": True}
    )
    assert by_python.enable_lora and by_python.lora_modules


@pytest.mark.parametrize("module", ["speedup", "overhead", "gateway"])
def test_a_benchmark_with_wrong_settings_is_one_line(module, tmp_path):
    (tmp_path / "c.yaml").write_text("stack: {redis_url: 'redis://a,b'}")
    command = [sys.executable, "-m", f"kvttl.bench.{module}", "--config", str(tmp_path / "c.yaml")]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 1 and done.stderr.startswith("error: redis_url is not allowed")
    assert len(done.stderr.splitlines()) == 1


def test_contenders_override_what_is_said():
    own = {*PORT_FIELDS, *contenders._OWN, *contenders._MANAGED, "l1_size_gb"}
    assert own == OF_THE_BENCHMARK
