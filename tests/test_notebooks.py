"""Every notebook runs headless, top to bottom, in a fresh kernel; found by glob."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_trace_formats import COPILOT, TRACELAB, written
from trace_fixtures import SAMPLE_FILE

from kvttl.replay import replay
from kvttl.traces import traces_at_hand

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Those that need no engine, and what a caller may want of them.
QUICK = {
    "04_ttl_and_tier_plots": {"log_folder": "~/sample.jsonl"},
    "05_trace_replay": {"capacity": 0.02, "base_ttl": 30},
    "06_speedup_benchmark": {"requests": 20, "seed": 1},
    "08_learned_ttl": {"trace_name": "sample", "capacity": 0.02, "hours": 0.5},
    "10_published_figures": {"trace_dir": "~/traces", "block_tokens": 64},
}
EXPORTS = {  # what they write
    "05_trace_replay": {f"policies_sample.{kind}" for kind in ("csv", "png")},
    "08_learned_ttl": {
        f"learned_sample_{what}.{kind}"
        for what in ("hazards", "life", "price", "hits")
        for kind in ("csv", "png")
    },
    "10_published_figures": {f"published_figures.{kind}" for kind in ("csv", "png")},
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def run(notebook, folder):
    """Run a notebook in a working folder; returns all that it shows."""
    client = NotebookClient(
        notebook,
        timeout=600,  # a cell; loading vLLM takes 20 s on an idle machine
        startup_timeout=300,  # of the kernel
        kernel_name="python3",
        resources={"metadata": {"path": folder}},
    )
    client.execute()
    code = code_cells(notebook)
    assert all(cell.execution_count for cell in code)
    shown = "".join(str(cell.outputs) for cell in code)
    assert "Traceback" not in shown
    return shown


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(notebook):
    """The one cell that papermill takes for the parameters: its index, its values' names."""
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    assert [tag for each in tags for tag in each] == ["parameters"]
    index = tags.index(["parameters"])
    lines = ast.parse(notebook.cells[index].source).body
    names = [line.targets[0].id for line in lines if isinstance(line, ast.Assign)]
    assert all(isinstance(line, (ast.Assign, ast.ImportFrom)) for line in lines) and names
    return index, names


@pytest.mark.timeout(1_200)
@each_notebook
def test_runs_top_to_bottom_in_any_folder(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    elsewhere = tmp_path / "my project"
    (elsewhere / "data").mkdir(parents=True)  # another project's, with a file of the same name
    (elsewhere / "config.yaml").write_text("learning_rate: 0.1\n")
    run(notebook, elsewhere)
    nbformat.write(notebook, tmp_path / path.name)  # kept by pytest, to look at
    # What it writes is under the kit's data/, not where it happens to run.
    assert [file.name for file in elsewhere.iterdir()] == ["data", "config.yaml"]
    assert not list((elsewhere / "data").iterdir())


@each_notebook
def test_each_parameter_is_used_later(path):
    notebook = nbformat.read(path, as_version=4)
    index, names = parameters(notebook)
    rest = "\n".join(cell.source for cell in code_cells(notebook) if cell.id != "parameters")
    used = set(re.findall(r"\w+", rest))
    assert set(names) <= used
    earlier = [cell for cell in notebook.cells[:index] if cell.cell_type == "code"]
    assert earlier == []  # nothing is computed from a value that papermill replaces later


def others_traces(folder):
    """Make a folder of traces as notebook 10 wants it, with samples of ours in three formats."""
    for name, records in (("tracelab", TRACELAB), ("copilot", COPILOT)):
        (folder / name).mkdir(parents=True)
        written(folder / name / "a.jsonl", records)
    (folder / "mooncake").mkdir()
    shutil.copy(SAMPLE_FILE, folder / "mooncake" / "conversation_trace.jsonl")  # gzip: by content


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("name", QUICK)
def test_other_parameters_are_followed(name, tmp_path, monkeypatch):
    """As papermill does it: a cell with the caller's values after the tagged one."""
    shutil.copytree(ROOT / "data" / "reports", tmp_path / "data" / "reports")
    report = tmp_path / "data" / "reports" / "speedup.json"
    report.write_text(re.sub('"cpu": ".*"', '"cpu": "of the test"', report.read_text()))
    shutil.copy(ROOT / "data" / "sample_decisions.jsonl", tmp_path / "sample.jsonl")
    others_traces(tmp_path / "traces")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KV_TRACE_DIR", raising=False)
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    index, names = parameters(notebook)
    given = {"data": "~/data", **QUICK[name]}
    assert set(given) <= set(names)
    lines = [f"{key} = {value!r}" for key, value in given.items()]
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    shown = run(notebook, ROOT)  # as VS Code does: the folder that is open
    hits = replay(traces_at_hand()["sample"], "lru", 0.02).block_level_hits
    expected = {
        "04_ttl_and_tier_plots": f"129 records in {tmp_path}/sample.jsonl",
        "05_trace_replay": f"LRU hits: {hits} here",
        "06_speedup_benchmark": "'cpu': 'of the test'",
        "08_learned_ttl": "sample: TTL when the generation ends",
        # TraceLab's sample within an hour, (192 + 64) / (300 + 320) hit for .986; ours as
        # Mooncake's in 1 M tokens, .947 for .056.
        "10_published_figures": "11 of 15 published figures are of files that are here:"
        " ours are 0.419 to 16.916 times theirs",
    }
    assert expected[name] in shown
    written = {path.name for path in (tmp_path / "data").glob("exports/*")}
    assert written == EXPORTS.get(name, set())
