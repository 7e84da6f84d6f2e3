"""Names: no two public functions or classes of the source share one."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def test_no_two_public_names_are_the_same():
    places = defaultdict(list)
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, DEFINITIONS) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(SOURCE)))
    assert "main" in places and "DecisionRecord" in places  # the entry points, and classes
    assert {name: at for name, at in places.items() if len(at) > 1 and name != "main"} == {}
