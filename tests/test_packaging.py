"""The requirements files declare what the code imports."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]
PRODUCT = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")] if path not in TESTS]


def third_party_imports(paths):
    """The top-level packages that files import, without Python's own and the project's."""
    project = {part.removesuffix(".py") for path in PRODUCT + TESTS for part in path.relative_to(ROOT).parts}
    names = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names - project - sys.stdlib_module_names


@pytest.mark.parametrize(
    ("paths", "files"),
    [(PRODUCT, ["requirements.txt"]), (PRODUCT + TESTS, ["requirements.txt", "requirements-dev.txt"])],
    ids=["product", "everything"],
)
def test_every_import_is_declared_and_every_declared_package_imported(paths, files):
    lines = [line for name in files for line in (ROOT / name).read_text().splitlines() if line[:1].isalpha()]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_"): line for line in lines}
    imported = third_party_imports(paths)
    assert sorted(imported - declared.keys()) == []
    assert [line for name, line in declared.items() if name not in imported and "#" not in line] == []  # it says why
