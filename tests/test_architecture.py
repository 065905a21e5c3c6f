"""Imports run one way: a file may import only what stands to its left in this chain, and files of its own folder."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHAIN = ("config", "storage", "conversations", "data", "compute", "model", "evaluation", "eval", "running", "train")
FILES = [*ROOT.glob("*.py"), *(path for name in CHAIN for path in (ROOT / name).glob("*.py"))]


def imported_by(path):
    """The project's modules that a file imports, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in CHAIN)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    allowed = CHAIN[: CHAIN.index(own) + 1]
    assert [name for name in imported_by(path) if name.split(".")[0] not in allowed] == []


@pytest.mark.parametrize("folder", [name for name in CHAIN if (ROOT / name).is_dir()])
def test_no_folder_imports_in_a_circle(folder):
    waiting = {
        path.stem: {name.split(".")[1] for name in imported_by(path) if name.startswith(f"{folder}.")}
        for path in (ROOT / folder).glob("*.py")
    }
    while ready := [name for name, needed in waiting.items() if not needed & waiting.keys()]:
        for name in ready:
            del waiting[name]
    assert waiting == {}
