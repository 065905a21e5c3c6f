"""The benchmarks for a GPU, as far as they can be tried without one."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import compare

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "quickstart.jsonl"
PYTHON = """#!/bin/bash
case "$*" in *"version('trl')"*) exit $NO_TRL;; *"-c "*) exit 0;; esac
printf '%s\\t' "$CUDA_VISIBLE_DEVICES" "$@" >> "$LOG"; echo >> "$LOG"
"""


@pytest.mark.parametrize("no_trl", [0, 1], ids=["TRL", "no TRL"])
def test_the_steps_for_a_gpu_are_commands_that_exist(tmp_path, no_trl):
    """What each step starts, in the place of Python: it is not run."""
    script, log, python = tmp_path / "benchmarks" / "gpu.sh", tmp_path / "log", tmp_path / "bin" / "python"
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "gpu.sh", script)
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "2,3"}
    environment |= {"LOG": str(log), "NO_TRL": str(no_trl)}
    done = subprocess.run(["bash", script, EXAMPLE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = [line.strip("\t").split("\t") for line in log.read_text().splitlines()]
    steps = [command for command in commands if "benchmarks.compare" in command]
    assert len(steps) == 6 - no_trl
    for gpus, *arguments in commands:
        in_the_table = "benchmarks.compare" in arguments
        assert gpus == ("2" if in_the_table else "2,3")  # Trainer uses every GPU that it sees
        if in_the_table:
            text = " ".join(arguments)
            engines = arguments[arguments.index("--engines") + 1 : arguments.index("--device")]
            assert set(engines) <= compare.ENGINES.keys()
            size, updates = (int(re.search(rf"{name} (\d+)", text)[1]) for name in ("--batch-size", "--updates"))
            assert size * (1 + updates) <= len(EXAMPLE.read_text().splitlines())
    assert ("trl is not installed: left out" in done.stdout) == bool(no_trl)


@pytest.mark.parametrize("rows", range(1, 40, 3))
@pytest.mark.parametrize("at_once", [1, 2, 8, 16])
def test_an_update_of_another_engine_has_all_of_its_rows(rows, at_once):
    """Its micro-batches have no more rows than asked, and together those of an update, or one more in some."""
    found = {}
    options = {"batch_size": rows}
    precision = SimpleNamespace(device=SimpleNamespace(type="cpu"), name="fp32")
    workload = SimpleNamespace(options=options, precision=precision, tokenizer=None, examples=[], model=None)
    trainer = SimpleNamespace(train=lambda: None)
    kind, arguments = (lambda *_, **__: trainer), (lambda _, **how: found.update(how))
    compare.train_with_trainer(workload, at_once, kind=kind, arguments=arguments)
    size, count = found["per_device_train_batch_size"], found["gradient_accumulation_steps"]
    assert size <= at_once
    assert rows <= size * count < rows + count
