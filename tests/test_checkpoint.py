"""A directory is complete or absent, and the newest checkpoints are kept."""

import pytest

from checkpoint import checkpoints, replace_directory, save_checkpoint


def writer(text):
    return lambda path: (path / "file").write_text(text)


def test_a_directory_is_replaced_whole(tmp_path):
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


def test_the_newest_checkpoints_are_kept_by_number_not_by_name(tmp_path):
    for step in (8, 9, 10, 100):
        save_checkpoint(tmp_path, step, writer(str(step)), keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-9", "step-10", "step-100"]
