"""Imports run one way: a file may import only what stands to its left in this chain, and files of its own folder."""

import ast
import importlib
import inspect
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHAIN = ("config", "storage", "conversations", "data", "compute", "model", "evaluation", "eval", "running", "train")
OTHERS = ("tests", "benchmarks", "examples")
FILES = [*ROOT.glob("*.py"), *(path for path in ROOT.glob("[!.]*/*.py") if path.parent.name not in OTHERS)]
MAX_PRODUCT_LINES, MAX_TRAIN_LINES, MAX_TRAIN_IMPORTS = 9_980, 400, 35


def project_imports(path):
    """The project's names that a file imports, dotted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in CHAIN)


def test_imports_run_one_way():
    violations = []
    for path in FILES:
        place = path.relative_to(ROOT).parts[0].removesuffix(".py")
        allowed = CHAIN[: CHAIN.index(place) + 1]
        for name in project_imports(path):
            if name.split(".")[0] not in allowed:
                violations.append(f"{path.relative_to(ROOT)} imports {name}")
    assert violations == []


def test_no_folder_imports_in_a_circle():
    for folder in (name for name in CHAIN if (ROOT / name).is_dir()):
        waiting = {
            path.stem: {name.split(".")[1] for name in project_imports(path) if name.startswith(f"{folder}.")}
            for path in ROOT.glob(f"{folder}/*.py")
        }
        while ready := [name for name, needed in waiting.items() if not needed & waiting.keys()]:
            for name in ready:
                del waiting[name]
        assert waiting == {}, folder


def test_it_fits_into_one_head():
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    assert lines[ROOT / "train.py"] <= MAX_TRAIN_LINES
    assert len(set(project_imports(ROOT / "train.py"))) <= MAX_TRAIN_IMPORTS
    assert sum(lines.values()) <= MAX_PRODUCT_LINES


def test_what_others_call_has_types():
    for place in ("train.train_step", "conversations.masking.encode", "eval.evaluate"):
        module, name = place.rsplit(".", 1)
        signature = inspect.signature(getattr(importlib.import_module(module), name))
        untyped = [name for name, parameter in signature.parameters.items() if parameter.annotation is parameter.empty]
        assert untyped == [], place
        assert signature.return_annotation is not signature.empty, place
