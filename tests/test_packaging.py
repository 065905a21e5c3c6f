"""The requirements files hold the pins of pyproject.toml."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {"requirements.txt": PROJECT["dependencies"]} | {
    f"requirements-{name}.txt": pins for name, pins in PROJECT["optional-dependencies"].items()
}


@pytest.mark.parametrize("name", PINS)
def test_requirements_are_those_of_pyproject(name):
    lines = (ROOT / name).read_text().splitlines()
    assert sorted(line for line in lines if line and not line.startswith(("#", "-r"))) == sorted(PINS[name])
