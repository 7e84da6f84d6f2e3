"""What README, docs/ and notebooks name exists: links, commands, variables, modules, files."""

from __future__ import annotations

import ast
import builtins
import fnmatch
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
DOCS = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "data" / "README.md"]
MAKEFILE = (ROOT / "Makefile").read_text()
# Names that an example takes from its reader.
GIVEN = {"llm", "model", "prompt", "prompts", "sampling_params", "cache_manager", "RULES"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page):
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)


def spans(page):
    """Every `span of code` outside the blocks."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"`([^`]+)`", prose)


def code(page):
    """Blocks and spans, as one text."""
    return "\n".join([text for _, text in blocks(page)] + spans(page))


def module_file(name):
    """A dotted module's file, or None if it is not one of src."""
    path = SRC.joinpath(*name.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def bound(statement):
    """Names that a statement binds in the scope that it stands in."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    nodes = ast.walk(statement)
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def has(module, name):
    """Whether a module of src defines or imports a name, or is a package that holds it."""
    statements = ast.parse(module_file(module).read_text()).body
    is_bound = any(name in bound(statement) for statement in statements)
    return is_bound or module_file(f"{module}.{name}") is not None


def classes():
    """Class name -> its methods, fields and attributes of self, of every class in src."""
    found = {}
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                members = found.setdefault(node.name, set())
                members |= {name for statement in node.body for name in bound(statement)}
                attributes = (n for n in ast.walk(node) if isinstance(n, ast.Attribute))
                members |= {n.attr for n in attributes if ast.unparse(n.value) == "self"}
    return found


CLASSES = classes()


# --- form -----------------------------------------------------------------------------------


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_each_page_opens_with_its_question_and_is_in_the_readme(page):
    title, opening = page.read_text().split("\n\n")[:2]
    assert title.startswith("# ") and opening.rstrip().endswith("?")
    assert f"](docs/{page.name}" in (ROOT / "README.md").read_text()


def test_the_readme_lists_every_notebook():
    listed = re.findall(r"^\| `(\d\d_\w+)` \|", (ROOT / "README.md").read_text(), re.M)
    assert listed == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("page", ["README.md", "docs/measuring.md"])
def test_ratios_with_an_interval_are_those_of_the_committed_benchmark(page):
    ratio = re.compile(r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]")
    plain = " ".join((ROOT / page).read_text().replace("**", "").split())
    report = json.loads((ROOT / "data" / "reports" / "speedup.json").read_text())
    shown = set(ratio.findall(plain))
    assert shown and shown <= set(ratio.findall("\n".join(report["text"])))


# --- links and files ------------------------------------------------------------------------


def anchors(page):
    """The anchors that a page's headings get on GitHub."""
    titles = re.findall(r"^#+ +(.+)$", re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            yield target


@each_page
def test_links_lead_somewhere(page):
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](page.md#a-title) [b](page.md#b) [c](gone.md) [d](http://x)\n")
    assert list(broken_links(page)) == ["page.md#b", "gone.md"]


def is_made_later(path):
    """Whether git ignores it: a run, an export or a user writes it."""
    patterns = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    parents = [path, *(str(parent) for parent in Path(path).parents)]
    return any(fnmatch.fnmatch(p, pattern) for p in parents for pattern in patterns)


PATH = re.compile(
    r"(?:src|kvttl|tests|docs|data|notebooks|\.ci)/[\w./-]*\w|[\w/-]+\.(?:yaml|toml|txt)"
)


def missing_files(page):
    """Paths in `spans` that are neither in the repository nor made by a run."""
    named = [span.rstrip("/") for span in spans(page) if PATH.fullmatch(span.rstrip("/"))]
    named += re.findall(r"(?<![\w/])tests/\w+\.py", page.read_text())
    for name in named:
        beside = page.parent / name
        places = (ROOT / name, SRC / name, SRC / f"{name}.py", beside)
        later = is_made_later(name) or is_made_later(str(beside.relative_to(ROOT)))
        if not later and not any(place.exists() for place in places):
            yield name


@each_page
def test_files_that_are_named_exist(page):
    assert list(missing_files(page)) == []


# --- commands -------------------------------------------------------------------------------


@each_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.M))
    assert sorted(set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", code(page))) - targets) == []


@each_page
def test_make_variables_exist(page):
    named = set(re.findall(r"\b((?!KV_)[A-Z][A-Z_]*)=", code(page)))
    known = set(re.findall(r"\$\((\w+)\)|^(\w+) \?=", MAKEFILE, re.M))
    assert sorted(named - {name for pair in known for name in pair}) == []


@each_page
def test_environment_variables_are_read_somewhere(page):
    files = [*SRC.rglob("*.py"), ROOT / "Makefile", *(ROOT / ".ci").iterdir()]
    text = "\n".join(file.read_text() for file in files)
    named = set(re.findall(r"\bKV_[A-Z_]+\b", page.read_text()))
    assert sorted(name for name in named if name not in text) == []


@each_page
def test_modules_that_are_run_are_commands_with_these_options(page):
    for name, arguments in re.findall(r"python -m ([\w.]+)(.*)", code(page)):
        file = module_file(f"{name}.__main__") or module_file(name)
        assert file and '__name__ == "__main__"' in file.read_text(), name
        for option in re.findall(r"--[a-z-]+", arguments):
            assert f'"{option}"' in file.read_text(), option


# --- Python ---------------------------------------------------------------------------------


def wrong_imports(statements):
    """Imports of a block that lead nowhere; packages of others are looked up, not imported."""
    for node in statements:
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            if module_file(module.split(".")[0]) is None:
                if importlib.util.find_spec(module.split(".")[0]) is None:
                    yield module
            elif module_file(module) is None or (name and not has(module, name)):
                yield f"{module}.{name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_import_what_exists(path):
    cells = [c["source"] for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    code = "\n".join("".join(source) for source in cells)
    python = re.sub(r"^\s*[%!].*$", "pass", code, flags=re.M)
    assert list(wrong_imports(ast.walk(ast.parse(python)))) == []


def unknown_names(block):
    """Names that a block uses without importing, making or being given them."""
    loaded = {n.id for n in ast.walk(block) if isinstance(n, ast.Name) and n.id not in GIVEN}
    made = {name for statement in block.body for name in bound(statement)}
    return sorted(loaded - made - set(dir(builtins)))


@each_page
def test_python_examples_import_what_exists_and_all_they_use(page):
    for language, text in blocks(page):
        if language == "python":
            block = ast.parse(text)
            assert list(wrong_imports(ast.walk(block))) == []
            assert unknown_names(block) == []


def test_a_wrong_import_and_a_missing_one_are_found():
    block = ast.parse("from kvttl.settings import no_such\nimport no_such_package\nuse(Path)")
    assert list(wrong_imports(block.body)) == ["kvttl.settings.no_such", "no_such_package"]
    assert unknown_names(block) == ["Path", "use"]


@each_page
def test_modules_classes_and_methods_that_are_named_exist(page):
    wrong = []
    for span in spans(page):
        dotted = re.match(r"(?:kvttl\.[\w.]*\w)", span)
        member = re.match(r"([A-Z]\w+)\.(\w+)", span)
        if dotted:
            module, _, name = dotted[0].rpartition(".")
            if not module_file(dotted[0]) and not (module_file(module) and has(module, name)):
                wrong.append(span)
        elif member and member[1] in CLASSES and member[2] not in CLASSES[member[1]]:
            wrong.append(span)
    assert wrong == []
