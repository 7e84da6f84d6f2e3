"""The repository keeps its own rules: pins, sizes, rooms, targets, clean notebooks."""

from __future__ import annotations

import ast
import collections
import functools
import graphlib
import importlib
import io
import json
import os
import re
import statistics
import subprocess
import tokenize
import tomllib
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "src").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BUDGET_CODE_LINES = 19_150  # of src: what runs inside LMCache took 2,350, the page 540
# Spelled in parts, so that this file does not hold what it looks for.
PRIVATE_PATHS = re.compile(rb"(?<![\w.])/(?:" + b"|".join([b"wo" + b"rk", b"ro" + b"ot"]) + rb")/")


def canonical(name):
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines):
    """Canonical name -> version of `name==version` lines."""
    return {canonical(name): v for name, v in (line.split("==") for line in lines)}


def requirement_lines(*names):
    """The pins of the files, of both if none is named."""
    names = names or ("requirements.txt", "requirements-agents.txt")
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@functools.cache
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# --- pins ---------------------------------------------------------------------------------


def test_every_requirement_is_an_exact_pin():
    pin = re.compile(r"[A-Za-z0-9][\w.-]*(\[[\w,-]+\])?==[0-9][\w.+!]*")
    assert [line for line in requirement_lines() if not pin.fullmatch(line)] == []
    names = [canonical(line.split("==")[0]) for line in requirement_lines()]
    assert len(names) > 50
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize("group", ["dependencies", "cpu", "dev", "agents"])
def test_direct_pins_equal_the_lock(group):
    project = pyproject()["project"]
    direct = project.get(group) or project["optional-dependencies"][group]
    own_file = f"requirements-{group}.txt"
    locked = pins(requirement_lines(own_file if group == "agents" else "requirements.txt"))
    different = {n: (v, locked.get(n)) for n, v in pins(direct).items() if locked.get(n) != v}
    assert different == {}, "name: (pyproject.toml, requirements.txt)"


def test_packages_that_break_the_cpu_build_are_absent():
    assert {"torchvision", "torchaudio", "torchcodec"} & set(pins(requirement_lines())) == set()


def test_pins_install_on_the_oldest_python_3_11():
    """Debian 12's is 3.11.2, Ubuntu 22.04's calls itself 3.11.0."""
    locked = pins(requirement_lines())
    asked = {name: metadata(name).get("Requires-Python") for name in locked}
    newer = {n: v for n, v in asked.items() if v and "3.11.0" not in SpecifierSet(v)}
    assert newer == {}
    older_only = {
        canonical(need.name)
        for name in locked
        for need in map(Requirement, requires(name) or ())
        if need.marker and needed_on(need, "3.11.0") and not needed_on(need, "3.11.99")
    }
    assert older_only and older_only <= set(locked)


def needed_on(requirement, python):
    return requirement.marker.evaluate({"python_full_version": python, "extra": ""})


def test_conda_environment_installs_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == pyproject()["project"]["name"]
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    assert {"python=3.11", "pip", "redis-server", "openssl", "libnuma"} <= set(plain)
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert "-r requirements.txt" in pip


# --- modules ------------------------------------------------------------------------------


@functools.cache
def tree(path):
    return ast.parse(path.read_text(), str(path))


def functions():
    """("module.function", lines) of every function and method under src."""
    return [
        (f"{dotted(path)}.{node.name}", node.end_lineno - node.lineno + 1)
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, FUNCTIONS)
    ]


def dotted(path):
    """A module's name as Python imports it."""
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


NAMES = {dotted(path) for path in MODULES}


def imported(path):
    """Modules of src that a module imports, at its top or inside its functions."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & NAMES - {"kvttl"}


def test_packaged_modules_are_those_of_src():
    setuptools = pyproject()["tool"]["setuptools"]
    assert setuptools["py-modules"] == [path.stem for path in MODULES if path.parent.name == "src"]
    assert setuptools["packages"]["find"] == {"where": ["src"]}
    assert all(
        (path.parent / "__init__.py").exists() for path in MODULES if path.parent.name != "src"
    )


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {dotted(path): imported(path) for path in MODULES}
    assert any(graph.values())
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def code_lines(text):
    """Lines of a module that are neither blank nor comment nor docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def test_code_lines_are_counted_without_blanks_comments_and_docstrings():
    text = '"""Doc\n\nstring."""\n\n# comment\ndef f():\n    """Doc."""\n'
    text += '    return """a\n\nb"""  # end\n'
    assert code_lines(text) == 4  # def, and a text of three lines


def test_modules_have_at_most_300_code_lines():
    lines = {dotted(path): code_lines(path.read_text()) for path in MODULES}
    assert {name: n for name, n in lines.items() if n > 300} == {}


def test_the_house_keeps_its_budget_of_code_lines():
    assert sum(code_lines(path.read_text()) for path in MODULES) <= BUDGET_CODE_LINES


def test_a_folder_has_at_most_13_modules():
    folders = collections.Counter(path.parent for path in MODULES if path.name != "__init__.py")
    assert {str(folder): n for folder, n in folders.items() if n > 13} == {}


def test_no_function_is_longer_than_60_lines():
    too_long = {name: n for name, n in functions() if n > 60}
    assert not too_long, too_long


def test_the_median_function_has_at_most_10_lines():
    lengths = sorted(functions(), key=lambda item: -item[1])
    assert statistics.median(n for _, n in lengths) <= 10, lengths[:20]


def test_every_module_and_public_function_says_what_it_is_for():
    silent = [
        f"{dotted(path)}.{node.name}"
        for path in MODULES
        for node in tree(path).body
        if isinstance(node, (*FUNCTIONS, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    silent += [path.name for path in MODULES if not ast.get_docstring(tree(path))]
    assert not silent, ", ".join(silent)


def test_no_two_public_functions_or_classes_have_one_name():
    public = [
        (node.name, dotted(path))
        for path in MODULES
        for node in tree(path).body
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_")
    ]
    times = collections.Counter(name for name, _ in public)
    assert [pair for pair in public if times[pair[0]] > 1 and pair[0] != "main"] == []


# --- rooms --------------------------------------------------------------------------------

# Room of src -> the rooms that it may import; the README's "Where things are", in its order.
MAY_IMPORT = {
    "caching_heuristics": "nothing",
    "background": "nothing",
    "storage": "caching_heuristics",
    "traces": "nothing",
    "policies": "caching_heuristics",
    "settings": "caching_heuristics",
    "lmcache": "caching_heuristics, background",
    "decisions": "caching_heuristics, background, settings",
    "stack": "caching_heuristics, background, storage, settings, lmcache",
    "manager": "caching_heuristics, background, policies, lmcache, decisions",
    "tiered_caching": "caching_heuristics, background, storage, lmcache, decisions, manager",
    "cache_controller": "caching_heuristics, lmcache, tiered_caching",
    "replay": ("caching_heuristics, traces, policies, settings, lmcache, manager, tiered_caching"),
    "meter": (
        "caching_heuristics, background, traces, policies, lmcache, decisions, manager, replay"
    ),
    "server": (
        "caching_heuristics, background, lmcache, decisions, stack, manager, tiered_caching, "
        "replay, meter"
    ),
    "plots": "caching_heuristics, traces, policies, decisions, replay",
    "policy_tuning": "caching_heuristics, traces, settings, replay, plots",
    "session": "all above",
    "sliders": (
        "caching_heuristics, traces, settings, lmcache, decisions, replay, plots, policy_tuning"
    ),
    "agents": ("caching_heuristics, lmcache, decisions, manager, tiered_caching, plots, session"),
    "serve": ("caching_heuristics, settings, lmcache, decisions, stack, tiered_caching, session"),
    "bench": "all above",
}
# What the requirements define in each of the three modules.
DOORS = {
    "caching_heuristics": ["compute_ttl", "select_backend"],
    "cache_controller": ["LMCacheController", "LocalLMCacheController"],
    "tiered_caching": [
        *("BaseBackend", "InMemoryBackend", "LocalDiskBackend", "RemoteBackend"),
        "MultiTierCache",
    ],
}


def room(name):
    """The room of a dotted module: a wing, a module beside the wings, or a door."""
    parts = name.split(".")
    return parts[1] if parts[0] == "kvttl" and len(parts) > 1 else parts[0]


def may_import(wing):
    """The rooms that a room may import, as a set."""
    allowed = MAY_IMPORT[wing].replace("nothing", "")
    above = list(MAY_IMPORT)[: list(MAY_IMPORT).index(wing)]
    return set(above) if allowed == "all above" else set(filter(None, allowed.split(", ")))


def test_the_readme_says_what_each_room_may_import():
    rows = re.findall(r"^\| `(?:kvttl/)?(\w+)` \| .+ \| (.+) \|$", readme(), re.M)
    assert dict(rows) == MAY_IMPORT and [name for name, _ in rows] == list(MAY_IMPORT)


def readme():
    """The README's part on rooms."""
    return (ROOT / "README.md").read_text().split("## Where things are")[1].split("\n## ")[0]


@pytest.mark.parametrize("wing", MAY_IMPORT)
def test_a_room_imports_only_what_it_may_and_nothing_below_it(wing):
    above = list(MAY_IMPORT)[: list(MAY_IMPORT).index(wing)]
    assert may_import(wing) <= set(above)
    modules = [path for path in MODULES if room(dotted(path)) == wing]
    wrong = {
        dotted(path): sorted(found)
        for path in modules
        if (found := {room(name) for name in imported(path)} - may_import(wing) - {wing})
    }
    assert modules and wrong == {}


def test_every_module_is_in_a_room_of_the_table():
    assert {room(dotted(path)) for path in MODULES} == {*MAY_IMPORT, "kvttl"}


@pytest.mark.parametrize("door", DOORS)
def test_what_the_requirements_name_is_defined_in_its_module(door):
    module = importlib.import_module(door)
    for name in DOORS[door]:
        assert getattr(module, name).__module__ == door, name


# --- CI and make --------------------------------------------------------------------------


def make(*arguments):
    """What make prints; as if no other make had called the tests."""
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def phony_targets():
    joined = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    return [t for line in re.findall(r"^\.PHONY:(.*)$", joined, re.M) for t in line.split()]


def test_ci_runs_the_tests_by_the_readmes_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^make test$", script.read_text(), re.M)
    assert re.search(r"-m pytest$", make("-n", "test"), re.M)


def test_make_help_lists_every_documented_target():
    makefile = (ROOT / "Makefile").read_text()
    documented = re.findall(r"^([a-z][\w-]*):[^\n]*?## *\S", makefile, re.M)
    listed = dict(re.findall(r"^ *make +([\w-]+) +(\S.*)$", make("help"), re.M))
    assert sorted(listed) == sorted(documented) == sorted(phony_targets())
    wanted = {"help", "install", "run", "test", "notebooks", "lint", "clean-notebooks"}
    assert wanted <= set(listed)
    assert make() == make("help")


@pytest.mark.parametrize("target", phony_targets())
def test_every_target_can_be_made(target):
    assert make("-n", target).strip()


# --- notebooks ----------------------------------------------------------------------------


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def source(cell):
    text = cell["source"]
    return text if isinstance(text, str) else "".join(text)


def test_there_are_at_least_three_notebooks():
    assert len(NOTEBOOKS) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_results(path):
    cells = code_cells(path)
    assert cells
    with_results = [
        number
        for number, cell in enumerate(cells, start=1)
        if cell["outputs"] or cell["execution_count"] is not None
    ]
    assert with_results == [], "code cells with outputs or an execution count"


def test_notebook_cells_have_at_most_six_lines_in_the_median():
    counts = {
        path.name: statistics.median(
            sum(bool(line.strip()) for line in source(cell).splitlines())
            for cell in code_cells(path)
        )
        for path in NOTEBOOKS
    }
    assert counts
    assert {name: n for name, n in counts.items() if n > 6} == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_define_nothing_reusable(path):
    """No class, and no function but the few lines that a widget calls on each change."""
    offenders = []
    for cell in code_cells(path):
        python = re.sub(r"^\s*[%!].*$", "pass", source(cell), flags=re.M)
        for node in ast.walk(ast.parse(python)):
            if isinstance(node, ast.ClassDef):
                offenders.append(f"class {node.name}")
            elif isinstance(node, FUNCTIONS) and not is_callback(node, python):
                offenders.append(f"def {node.name}")
    assert offenders == []


def is_callback(function, cell):
    """Short, and handed to a widget in the very cell that defines it."""
    short = function.end_lineno - function.lineno < 6
    decorated = any("interact" in ast.unparse(d) for d in function.decorator_list)
    handed_on = rf"(interact\w*|observe|on_click)\(\s*{re.escape(function.name)}\b"
    return short and (decorated or bool(re.search(handed_on, cell)))


# --- private paths ------------------------------------------------------------------------


def files_in_git():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name)
    return [path for path in paths if path.is_file()]


def test_no_file_in_git_names_a_private_path():
    files = files_in_git()
    assert files
    offenders = [
        f"{path.relative_to(ROOT)}: {line.decode(errors='replace').strip()[:80]}"
        for path in files
        for line in path.read_bytes().splitlines()
        if PRIVATE_PATHS.search(line)
    ]
    assert offenders == []


@pytest.mark.parametrize("before", ["", '"', "file://", "=", "cd "])
def test_private_paths_are_recognised(before):
    for name in ("wo" + "rk", "ro" + "ot"):
        assert PRIVATE_PATHS.search(f"{before}/{name}/data".encode())
    assert not PRIVATE_PATHS.search(b"my.ro" + b"ot/x net" + b"wo" + b"rk/y ho" + b"me/z")
