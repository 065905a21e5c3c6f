"""The requirements files declare what the code imports, each version once; the documents say what is there."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]
OPTIONAL = {"lightning", "litgpt"}  # benchmarks.compare takes LitGPT where it is installed
PRODUCT = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")] if path not in TESTS]


def read_requirements(*names):
    """The (import name, line) of each package that requirements files declare."""
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines() if line[:1].isalpha()]
    return [(re.match(r"[\w-]+", line)[0].replace("-", "_"), line) for line in lines]


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
def test_every_import_is_declared_and_every_declared_package_is_imported(paths, files):
    declared, imported = read_requirements(*files), third_party_imports(paths)
    assert sorted(imported - OPTIONAL - {name for name, _ in declared}) == []
    assert [line for name, line in declared if name not in imported and "#" not in line] == []  # a comment says why


def test_every_package_is_pinned_once():
    declared = read_requirements("requirements.txt", "requirements-dev.txt", "requirements-quickstart.txt")
    names = [name for name, _ in declared]
    assert sorted(names) == sorted(set(names))
    assert [line for _, line in declared if "==" not in line] == []


def test_the_readme_quotes_train_step():
    quoted = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    lines = (line.strip() for line in (ROOT / "train.py").read_text().splitlines())
    assert [line for line in quoted.splitlines() if line.strip() not in lines] == []  # in order: `in` moves on


def test_links_lead_to_files():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/faults/*.md")]
    links = [(path, link) for path in documents for link in re.findall(r"\]\((?!http)([^)#\s]+)", path.read_text())]
    assert links
    assert [f"{path.name}: {link}" for path, link in links if not (path.parent / link).exists()] == []
