"""A directory is complete or absent, and the newest checkpoints are kept."""

import json
import os
from pathlib import Path

import pytest

from running.checkpoint import checkpoint_path, list_checkpoints, prune
from storage import durable
from storage.durable import CorruptError, atomic_directory, replace_link, verify


def write(path, text, about=None):
    """A directory at `path` with one file."""
    with atomic_directory(path, about or {}) as partial:
        (partial / "file").write_text(text)


def test_a_directory_is_replaced(tmp_path):
    for text in ("old", "new"):
        write(tmp_path / "it", text)
        assert (tmp_path / "it" / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_failed_write_changes_nothing(tmp_path):
    write(tmp_path / "it", "old")

    def fail():
        with atomic_directory(tmp_path / "it", {}) as partial:
            (partial / "file").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail()
    assert (tmp_path / "it" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_link_or_a_copy_of_its_target_is_replaced(tmp_path):
    for target in ("one", "two"):
        (tmp_path / target).mkdir()
        replace_link(tmp_path / "best", target)
        assert (tmp_path / "best").resolve() == tmp_path / target
    (tmp_path / "best").unlink()
    (tmp_path / "best").mkdir()
    replace_link(tmp_path / "best", "one")
    assert (tmp_path / "best").readlink() == Path("one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "one", "two"]


def save(run, step, keep=2, best=0):
    write(checkpoint_path(run, step), str(step), {"step": step, "best_step": best})
    prune(run, step, keep)
    return list(list_checkpoints(run))


def test_the_newest_checkpoints_are_kept_by_number(tmp_path):
    for step in (8, 9, 10, 100):
        kept = save(tmp_path, step, keep=3)
    assert kept == [9, 10, 100]


def test_the_best_checkpoint_of_each_kept_one_is_kept(tmp_path):
    """So a run can resume from any of them, and its best model is there."""
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 5)):
        kept = save(tmp_path, step, best=best)
    assert kept == [3, 4, 5]  # 4's best is 3
    assert save(tmp_path, 6, best=5) == [5, 6]


def test_checkpoints_after_the_current_step_are_not_counted(tmp_path):
    for step in (1, 2, 9):  # 9 is corrupt, say, and was skipped
        save(tmp_path, step, keep=3)
    assert save(tmp_path, 3) == [2, 3, 9]
    assert save(tmp_path, 9) == [3, 9]


def test_what_cannot_be_read_back_is_an_error(tmp_path, monkeypatch):
    def damage(path):
        (path / "file").write_text("x")
        return verify(path)

    monkeypatch.setattr(durable, "verify", damage)
    with pytest.raises(CorruptError, match="another SHA-256"):
        write(tmp_path / "it", "y")


def test_other_directories_are_not_checkpoints(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-old").mkdir()
    (tmp_path / "checkpoints" / ".step-2.partial-x").mkdir()
    assert list(list_checkpoints(tmp_path)) == [1]


def test_everything_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    """What a kill cannot show and a power cut would: all is forced to disk, then renamed, then that is."""
    done, sync, rename = [], durable.sync, os.replace

    def noted_sync(path):
        done.append(("sync", Path(path).name.split(".partial")[0]))
        sync(path)

    def noted_rename(source, target):
        done.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(durable, "sync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_rename)

    with atomic_directory(checkpoint_path(tmp_path, 1), {"step": 1}) as directory:
        (directory / "weights").write_text("w")
        (directory / "more").mkdir()
        (directory / "more" / "state").write_text("s")
    assert done[0] == ("sync", tmp_path.name)  # that there is a directory for checkpoints
    *before, renamed, after = done[1:]
    assert {name for _, name in before} == {"weights", "more", "state", "MANIFEST.json", ".step-1"}
    assert all(what == "sync" for what, _ in before)
    assert (renamed, after) == (("rename", "step-1"), ("sync", "checkpoints"))
    assert set(json.loads((tmp_path / "checkpoints/step-1/MANIFEST.json").read_text())["files"]) == {
        "weights",
        "more/state",
    }
