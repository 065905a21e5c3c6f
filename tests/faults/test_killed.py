"""`kill -9` at any instant: the run resumes and ends as if nothing had happened.

`make faults` makes it thorough: 50 kills, 20 of them inside a save, and one at every change a save makes to the disk.
"""

import random
import shutil
import time
from functools import partial
from pathlib import Path

import pytest

from tests.faults.harness import assert_same, some
from tests.faults.inject import kill_at_system_call


def assert_resumes(start_process, flags, run, uninterrupted):
    """Resume a killed run, or begin again where it had not yet begun, and compare."""
    begun = (run / "config.json").exists()
    process = start_process(["--resume", run] if begun else [*flags, "--output-dir", run])
    assert process.wait() == 0, process.stderr
    assert "skipped: " not in process.stderr
    assert_same(run, uninterrupted)


@pytest.fixture
def saving(flags):
    """The flags of a run that saves after each update."""
    return [*flags, "--save-every", "1"]


@pytest.mark.parametrize("number", some(range(30), fast=2))
def test_at_a_random_instant(saving, uninterrupted, start_process, tmp_path, number):
    seconds, chance, run = 1.5, random.Random(number), tmp_path / "run"
    process = start_process([*saving, "--output-dir", run])
    process.child.join(chance.uniform(0, seconds))
    while process.kill() == 0:  # it had ended before
        shutil.rmtree(run)
        seconds *= 0.8
        process = start_process([*saving, "--output-dir", run])
        process.child.join(chance.uniform(0, seconds))
    assert_resumes(start_process, saving, run, uninterrupted)


@pytest.mark.parametrize("number", some(range(20), fast=2))
def test_inside_a_save(saving, uninterrupted, start_process, tmp_path, number):
    """Proved by what the dead process left."""
    chance, run = random.Random(number), tmp_path / "run"
    process = start_process([*saving, "--output-dir", run])
    which = chance.randint(1, 10)
    process.wait_for(lambda: (run / "checkpoints" / f"step-{which}").exists() or partials(run, which))
    process.wait_for(lambda: partials(run))
    time.sleep(chance.uniform(0, 0.003))
    process.kill()
    assert partials(run)
    assert_resumes(start_process, saving, run, uninterrupted)


def partials(run, step=""):
    return list(Path(run).glob(f"checkpoints/.step-{step}*.partial-*"))


@pytest.mark.slow
def test_at_every_change_that_a_save_makes_to_the_disk(flags, uninterrupted, start_process, tmp_path):
    saving = [*flags, "--save-every", "1", "--keep", "1"]
    counted = tmp_path / "count"
    assert (
        start_process([*saving, "--output-dir", tmp_path / "all"], partial(kill_at_system_call, 0, counted)).wait() == 0
    )
    assert int(counted.read_text()) > 40
    for number in range(1, int(counted.read_text()) + 1):
        run = tmp_path / str(number)
        assert start_process([*saving, "--output-dir", run], partial(kill_at_system_call, number)).wait() == 128 + 9
        assert_resumes(start_process, saving, run, uninterrupted)
