"""A directory is complete or absent, and the newest checkpoints are kept."""

import itertools
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from running.checkpoints import checkpoints, save_checkpoint, step_of
from storage import durable as checkpoint
from storage.durable import Damaged, replace_directory, verify


def writer(text):
    return lambda path: (path / "file").write_text(text)


def test_a_directory_is_replaced_completely(tmp_path):
    for text in ("old", "new"):
        replace_directory(tmp_path / "best", writer(text))
        assert (tmp_path / "best" / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_failed_write_leaves_the_old_one_and_nothing_else(tmp_path):
    replace_directory(tmp_path / "best", writer("old"))

    def fail(path):
        (path / "file").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_directory(tmp_path / "best", fail)
    assert (tmp_path / "best" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def save(run, step, newest=2, also=None):
    save_checkpoint(run, {"step": step}, writer(str(step)), newest, also)
    return [step_of(path) for path in checkpoints(run)]


def test_the_newest_checkpoints_are_kept_by_number_not_by_name(tmp_path):
    for step in (8, 9, 10, 100):
        kept = save(tmp_path, step, newest=3)
    assert kept == [9, 10, 100]


def test_the_one_resumed_from_is_kept_and_those_beyond_it_are_not_counted(tmp_path):
    for step in (1, 2, 9):  # 9 is damaged, say, and was passed over
        save(tmp_path, step, newest=3)
    assert save(tmp_path, 3, also=1) == [1, 2, 3, 9]
    assert save(tmp_path, 4, also=1) == [1, 3, 4, 9]
    assert save(tmp_path, 9, also=1) == [1, 4, 9]


def test_nothing_is_removed_before_the_new_one_verifies(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)

    def damage(path):
        (path / "file").write_text("x")
        return verify(path)

    monkeypatch.setattr(checkpoint, "verify", damage)
    with pytest.raises(Damaged, match="another SHA-256"):
        save(tmp_path, 3)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [1, 2, 3]


def test_other_directories_are_no_checkpoints(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-old").mkdir()
    (tmp_path / "checkpoints" / ".step-2.unfinished-x").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1"]


def test_a_reader_never_meets_a_part_of_a_directory(tmp_path):
    """While a directory is replaced 200 times, a thread reads it by its name: there always, and always whole."""
    path, done = tmp_path / "best", threading.Event()

    def write(text):
        def files(directory):
            for name in ("a", "b", "c"):
                (directory / name).write_text(text)

        return files

    def read():
        for times in itertools.count():
            if done.is_set():
                return times
            assert all((path / name).read_text().isdigit() for name in ("a", "b", "c"))

    replace_directory(path, write("0"))
    with ThreadPoolExecutor() as threads:
        reader = threads.submit(read)
        for number in range(200):
            replace_directory(path, write(str(number)))
        done.set()
        assert reader.result() > 100


def test_where_directories_cannot_be_exchanged_two_renames_do(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "exchange", lambda *_: False)
    for text in ("old", "new"):
        replace_directory(tmp_path / "best", writer(text))
    assert (tmp_path / "best" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """What a kill cannot show and a power cut would: all is forced to disk, then renamed, then that is."""
    done, sync, rename = [], checkpoint.sync, os.replace

    def noted_sync(path):
        done.append(("sync", Path(path).name.split(".unfinished")[0]))
        sync(path)

    def noted_rename(source, target):
        done.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(checkpoint, "sync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_rename)

    def write(directory):
        (directory / "weights").write_text("w")
        (directory / "more").mkdir()
        (directory / "more" / "state").write_text("s")

    save_checkpoint(tmp_path, {"step": 1}, write, newest=1, also=None)
    assert done[0] == ("sync", tmp_path.name)  # that there is a directory for checkpoints
    *before, renamed, after = done[1:]
    assert {name for _, name in before} == {"weights", "more", "state", "MANIFEST.json", ".step-1"}
    assert all(what == "sync" for what, _ in before)
    assert (renamed, after) == (("rename", "step-1"), ("sync", "checkpoints"))
    assert set(json.loads((tmp_path / "checkpoints/step-1/MANIFEST.json").read_text())["files"]) == {
        "weights",
        "more/state",
    }
