"""The repository keeps its own rules: pins, module sizes, imports, targets, clean notebooks."""

from __future__ import annotations

import ast
import functools
import graphlib
import json
import os
import re
import statistics
import subprocess
import tomllib
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "src").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
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
        (f"{path.stem}.{node.name}", node.end_lineno - node.lineno + 1)
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, FUNCTIONS)
    ]


def imported(path):
    """Modules of src that a module imports, at its top or inside its functions."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names & {module.stem for module in MODULES}


def test_packaged_modules_are_those_of_src():
    packaged = pyproject()["tool"]["setuptools"]["py-modules"]
    assert packaged == [path.stem for path in MODULES]


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {path.stem: imported(path) for path in MODULES}
    assert any(graph.values())
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_modules_are_about_350_lines_or_fewer():
    lines = {path.name: len(path.read_text().splitlines()) for path in MODULES}
    too_long = {name: n for name, n in lines.items() if n > 385}  # "about": a tenth more
    assert not too_long, too_long


def test_no_function_is_longer_than_60_lines():
    too_long = {name: n for name, n in functions() if n > 60}
    assert not too_long, too_long


def test_the_median_function_has_at_most_10_lines():
    lengths = sorted(functions(), key=lambda item: -item[1])
    assert statistics.median(n for _, n in lengths) <= 10, lengths[:20]


def test_every_module_and_public_function_says_what_it_is_for():
    silent = [
        f"{path.stem}.{node.name}"
        for path in MODULES
        for node in tree(path).body
        if isinstance(node, (*FUNCTIONS, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    silent += [path.name for path in MODULES if not ast.get_docstring(tree(path))]
    assert not silent, ", ".join(silent)


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
