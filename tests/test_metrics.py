"""What a run shows while it goes on: progress, and text for TensorBoard."""

import pytest

from evaluation.facts import escape_markdown, format_duration
from running.progress import Progress


def test_markdown_and_html_in_a_text_stay_text():
    assert escape_markdown("**a** <b> `c` | [d](e)\nf\r_g_") == (
        "\\*\\*a\\*\\* &lt;b&gt; \\`c\\` \\| \\[d\\](e)<br>f<br>\\_g\\_"
    )


@pytest.mark.parametrize(("seconds", "reported"), [(50, [3, 4, 5, 6]), (20, [3, 4, 5, 6]), (12, [4, 6]), (1, [])])
def test_without_a_terminal_a_line_says_the_progress_every_half_minute(capsys, seconds, reported):
    now = [100.0]
    with Progress(6, 2, clock=lambda: now[0]) as progress:
        for _ in range(4):
            now[0] += seconds
            progress.update({"loss": 1.23456, "tokens_per_second": 1234.5})
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        f"  update {step:>5} of 6   loss 1.2346   1,234 tokens/s   about {format_duration((6 - step) * seconds)} left"
        for step in reported
    ]


def test_a_terminal_gets_a_bar_instead(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress(2, clock=iter((0.0, 100.0, 200.0)).__next__) as progress:
        for _ in range(2):
            progress.update({"loss": 1.23456, "tokens_per_second": 1234.5})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/2" in captured.err
    assert "loss 1.235, 1,234 tokens/s" in captured.err
