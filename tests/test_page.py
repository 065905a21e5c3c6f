"""The page about a run: complete, self-contained, safe to open, and never written over something else."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import eval as eval_command
import train as train_command
from config import UserError
from conversations.preview import PAGE
from evaluation.page import chart, duration, page
from storage.records import final_numbers, read_losses, read_metrics


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    """A finished run of three updates."""
    here = tmp_path_factory.mktemp("page")
    with open(here / "chats.jsonl", "w") as file:
        for number in range(40):
            messages = [
                {"role": "user", "content": f"Add {number}"},
                {"role": "assistant", "content": "1 " * (number + 1)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    flags = {"model": tiny_model_dir, "dataset": here / "chats.jsonl", "eval-fraction": 0.2, "test-fraction": 0.2}
    flags |= {"max-steps": 3, "dtype": "fp32", "lr": 1e-2, "warmup-steps": 0, "output-dir": here / "run"}
    assert train_command.main([str(part) for name, value in flags.items() for part in (f"--{name}", value)]) == 0
    return here / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, for a test of its own."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def evaluated(*arguments):
    return eval_command.main([*map(str, arguments), "--max-new-tokens", "1", "--greedy"])


def test_a_run_ends_with_its_page(run):
    text = (run / "report.html").read_text()
    assert text.startswith(PAGE)
    assert text.count("<svg") == 5
    assert text.count("<pre>") == 3
    assert "Who are you? (greedy)" in text
    assert "<b>chats.jsonl</b>" in text
    assert not re.search(r"(src|href)=|@import|url\(|<script", text)  # nothing outside of it is needed
    for kind in ("eval", "test"):
        lines = [line for line in read_metrics(run) if line["kind"] == kind]
        best = min((line for line in lines if line["step"]), key=lambda line: line["loss"])
        row = re.search(rf"<tr><td>{kind}<td>(\S+)<td>([^<]+)<td>[^<]*<td>([^<]*)", text)
        assert row.groups()[:2] == (f"{lines[0]['loss']:.4f}", f"{best['loss']:.4f}")
        assert "95 % interval [" in row.group(3)
        pairs = read_losses(run)[kind]["after"]
        assert sum(loss for loss, _ in pairs) / sum(tokens for _, tokens in pairs) == pytest.approx(best["loss"])


def test_losses_of_another_evaluation_give_no_interval(run, tiny_tokenizer):
    text = (run / "losses.json").read_text()
    (run / "losses.json").write_text(text.replace('"after": [[', '"after": [[7'))
    assert "interval" not in page(run, [], tiny_tokenizer)
    (run / "losses.json").write_text("{")
    assert "interval" not in page(run, [], tiny_tokenizer)


def test_lost_lines_of_the_log_lose_only_their_part(run, tiny_tokenizer):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for kept in ([], lines[:1], lines[1:], lines[3:4]):
        (run / "metrics.jsonl").write_text("".join(kept))
        assert page(run, [], tiny_tokenizer).startswith(PAGE)
        final_numbers(run)


def test_the_command_writes_it_anew_with_a_comparison(run, tiny_model_dir, tmp_path):
    assert evaluated(run, "--html", tmp_path / "page.html") == 0
    first = (tmp_path / "page.html").read_text()
    assert first == (run / "report.html").read_text()
    (tmp_path / "plain.txt").write_text("A text that nobody has trained on. " * 20)
    asked = ["--against", tiny_model_dir, "--text", tmp_path / "plain.txt"]
    assert evaluated(run, "--html", tmp_path / "page.html", *asked) == 0
    second = (tmp_path / "page.html").read_text()
    assert "Compared on the eval split" in second
    suite = re.search(r"<h2>Plain text</h2><pre class=many>(.*?)</pre>", second, re.DOTALL)[1]
    assert re.fullmatch(r"text  loss .*\n\ntext: .* against .*\n  loss .* 95 % interval \[.*", suite)


def test_it_is_never_written_over_anything_else(run, tiny_model_dir, chats, capsys, tmp_path):
    (tmp_path / "notes.html").write_text("mine")
    with pytest.raises(UserError, match="it exists and is not an earlier page"):
        evaluated(run, "--html", tmp_path / "notes.html")
    with pytest.raises(UserError, match="there is no directory"):
        evaluated(run, "--html", tmp_path / "no/page.html")
    for arguments in ((tiny_model_dir,), (run, "--dataset", chats)):
        with pytest.raises(UserError, match="--html is about a run and its own dataset"):
            evaluated(*arguments, "--html", tmp_path / "page.html")
    (run / "report.html").write_text("mine")
    (run / "answers.json").unlink()  # as if it had died before its end
    assert train_command.main(["--resume", str(run)]) == 0
    assert (run / "report.html").read_text() == "mine"
    assert "is not an earlier report, and is left as it is" in capsys.readouterr().err


def test_what_people_wrote_is_no_html(run, tiny_tokenizer):
    path = run / "answers.json"
    path.write_text(path.read_text().replace("Who are you?", "<script>alert(1)</script>"))

    class Tags(HTMLParser):
        seen = ()

        def handle_starttag(self, tag, attributes):  # noqa: ARG002
            self.seen = {*self.seen, tag}

    tags = Tags()
    tags.feed(page(run, [], tiny_tokenizer))
    assert "table" in tags.seen
    assert "script" not in tags.seen


def test_charts_and_durations():
    assert chart("x", train=[(1, 2.0)]) == ""
    assert 'points="52.0,160.0 412.0,8.0"' in chart("x", train=[(0, 1.0), (10, 3.0)])
    assert [duration(seconds) for seconds in (5.4, 65, 7260)] == ["5 s", "1 min 5 s", "2 h 1 min"]
