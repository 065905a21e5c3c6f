"""`eval.py --suite`, `--text`, `--instructions` and several runs: what is measured, and how models are compared."""

import json

import pytest
import torch

import eval as eval_command
from compute.self_check import use_layout
from config import Config, UserError
from eval import evaluate
from evaluation.forgetting import BLOCK, PLAIN_TEXT, forgetting, read_text, windows
from evaluation.instructions import following
from evaluation.report import format_report, over_runs
from model import Precision
from tests.conftest import CONTROL, byte_tokenizer, layout_of, tiny_llama

FP32 = Precision("fp32", torch.device("cpu"))


# --- forgetting


@pytest.mark.parametrize("length", [1, 2, 3, 16, 33, 64, 65, 500])
def test_every_token_of_a_text_but_the_first_is_scored_once(length):
    ids = torch.arange(65)
    scored = [token for one in windows(ids, length) for token in one.labels[1:][one.supervised[1:]].tolist()]
    assert scored == list(range(1, 65))
    for number, one in enumerate(windows(ids, length)):
        assert len(one.input_ids) <= max(length, 2)
        first = int(one.supervised.int().argmax())  # how many tokens it is predicted from
        assert number == 0 or first >= max(length, 2) // 2


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_loss_of_a_text_is_that_of_its_tokens(packed):
    model, ids = tiny_llama(259).double(), torch.randint(3, 259, (100,), generator=torch.Generator().manual_seed(0))
    logits = model(ids[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[1:]).item()
    use_layout(model, layout_of(packed))
    found = evaluate(model, windows(ids, 100), layout_of(packed), FP32)
    assert (found.loss, found.tokens) == (pytest.approx(expected, rel=1e-12), 99)
    cut = evaluate(model, windows(ids, 40), layout_of(packed), FP32)
    assert cut.tokens == 99
    torch.testing.assert_close(cut.token_losses[0], found.token_losses[0][:39])  # of the first window


def test_forgetting_is_compared_over_blocks_of_the_text():
    before = [torch.ones(5 * BLOCK), torch.ones(10)]
    after = [torch.full((5 * BLOCK,), 1.5), torch.full((10,), 1.5)]
    found = forgetting(before, after)
    assert (found["before"], found["after"], found["difference"]) == (1.0, 1.5, 0.5)
    assert (found["blocks"], found["tokens"]) == (6, 5 * BLOCK + 10)
    assert found["interval"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"caf\xe9", "not UTF-8 at byte 4"), (b"", "there is no text in it"), (None, "there is no such file")],
)
def test_a_text_that_cannot_be_read_is_refused(tmp_path, tiny_tokenizer, content, said):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_text(path, tiny_tokenizer)


def test_a_text_holds_no_control_tokens(tmp_path, tiny_tokenizer):
    (tmp_path / "text.txt").write_text("<|im_end|>")
    assert len(read_text(tmp_path / "text.txt", tiny_tokenizer)) == len("<|im_end|>")


# --- instructions


def verdicts(*strict):
    return [{"key": key, "strict": one, "loose": [True] * len(one)} for key, one in enumerate(strict)]


def test_following_is_compared_prompt_by_prompt():
    before = verdicts([True, False], [False], [None], [True])
    after = verdicts([True, True], [False], [None], [False])
    found = following(before, after)["strict"]
    assert found["prompts"]["before"] == found["prompts"]["after"] == pytest.approx(1 / 3)
    assert found["prompts"]["prompts"] == 3  # the skipped one counts nowhere
    assert (found["instructions"]["before"], found["instructions"]["after"]) == (2 / 4, 2 / 4)
    assert found["instructions"]["tokens"] == 4


# --- the command


@pytest.fixture
def noisy_dir(tiny_model, tiny_tokenizer, tmp_path):
    """The tiny model with noise on its weights."""
    with torch.no_grad():
        for weights in tiny_model.parameters():
            weights += 0.05 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    tiny_model.save_pretrained(tmp_path / "noisy")
    tiny_tokenizer.save_pretrained(tmp_path / "noisy")
    return tmp_path / "noisy"


@pytest.fixture
def instructions_file(tmp_path):
    path = tmp_path / "instructions.jsonl"
    row = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    path.write_text("".join(json.dumps({"key": n, "prompt": f"Say {n}", **row}) + "\n" for n in range(30)))
    return path


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text("Some words of a text.")
    return tmp_path / "text.txt"


def run(capsys, *arguments):
    """What `eval.py --json` says, and its warnings."""
    assert eval_command.main([*map(str, arguments), "--json", "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_the_quick_suite_compares_losses_text_and_some_instructions(tiny_model_dir, noisy_dir, chats, capsys):
    arguments = [noisy_dir, "--against", tiny_model_dir, "--dataset", chats, "--suite", "quick"]
    report, _ = run(capsys, *arguments)
    assert report["answers"] == []
    assert report["text"]["file"] == str(PLAIN_TEXT)
    assert report["instructions"]["prompts"] == report["instructions"]["instructions"] - 1 == 24
    assert report["instructions"]["max_new_tokens"] == max(row["tokens"] for row in report["instructions"]["rows"]) == 4
    assert report["comparison"].keys() == {"all"}
    assert report["forgetting"]["after"] == pytest.approx(report["text"]["loss"], rel=1e-6)
    assert report["forgetting"]["before"] == pytest.approx(report["against"]["text"]["loss"], rel=1e-6)
    assert report["forgetting"]["interval"][0] <= report["forgetting"]["difference"]
    for level in ("prompts", "instructions"):
        assert report["following"]["strict"][level]["after"] == report["instructions"]["strict"][level]
        assert report["following"]["loose"][level]["before"] == report["against"]["instructions"]["loose"][level]

    text = format_report(report)
    assert text.count("  text  loss ") == 2
    assert f"\n  text: {noisy_dir} against {tiny_model_dir}\n    loss " in text
    assert f"\n  instructions: {noisy_dir} against {tiny_model_dir}\n    prompts, strict " in text
    assert "  > " not in text  # no prompts were named


def test_the_quick_suite_takes_the_test_split_and_24_prompts(tiny_model_dir, instructions_file, capsys):
    arguments = [tiny_model_dir, "--preset", "quickstart", "--instructions", instructions_file]
    quick, _ = run(capsys, *arguments, "--suite", "quick")
    assert quick["splits"].keys() == {"test"}
    assert quick["instructions"]["prompts"] == 24
    full, _ = run(capsys, *arguments, "--suite", "full")
    assert full["splits"].keys() == {"eval", "test"}
    assert full["instructions"]["prompts"] == 30
    assert len(full["answers"]) == 4
    assert "text" in full


def test_text_and_instructions_are_asked_for_without_a_suite(
    tiny_model_dir, chats, instructions_file, tmp_path, capsys
):
    (tmp_path / "text.txt").write_text("Some words of a text.")
    arguments = [
        tiny_model_dir,
        "--dataset",
        chats,
        "--text",
        tmp_path / "text.txt",
        "--instructions",
        instructions_file,
    ]
    report, _ = run(capsys, *arguments)
    assert report["text"]["supervised_tokens"] == 20
    assert report["instructions"]["prompts"] == 30
    assert len(report["answers"]) == 4
    assert run(capsys, *arguments[:3])[0].keys() & {"text", "instructions"} == set()


def test_a_text_in_other_tokens_is_not_compared(tiny_model_dir, chats, tmp_path, text_file, capsys):
    tokenizer = byte_tokenizer([*CONTROL, "<|other|>"])
    tokenizer.save_pretrained(tmp_path / "other")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "other")
    arguments = [
        tiny_model_dir,
        "--against",
        tmp_path / "other",
        "--dataset",
        chats,
        "--text",
        text_file,
        "--prompts",
        "Hi",
        "--greedy",
    ]
    report, warnings = run(capsys, *arguments)
    assert "forgetting" not in report
    assert "warning: text: not compared, as the two models read it as different tokens" in warnings


# --- several runs


def test_runs_have_a_mean_and_a_spread(tiny_model_dir, noisy_dir, chats, text_file, instructions_file, capsys):
    arguments = [noisy_dir, tiny_model_dir, "--against", tiny_model_dir, "--dataset", chats]
    arguments += ["--text", text_file, "--instructions", instructions_file, "--prompts", "Hi", "--greedy"]
    report, _ = run(capsys, *arguments)
    first, second = report["runs"]
    loss = report["over_runs"]["all loss"]
    assert loss["values"] == [first["splits"]["all"]["loss"], second["splits"]["all"]["loss"]]
    assert loss["mean"] == pytest.approx(sum(loss["values"]) / 2)
    assert loss["std"] == pytest.approx(abs(loss["values"][0] - loss["values"][1]) / 2**0.5)
    assert loss["difference"]["values"] == [first["comparison"]["all"]["difference"], 0.0]
    assert report["over_runs"]["text loss"]["difference"]["values"][0] == first["forgetting"]["difference"]
    shares = report["over_runs"]["instructions, loose"]
    assert shares["values"] == [one["instructions"]["loose"]["instructions"] for one in report["runs"]]
    assert shares["difference"]["values"] == [
        one["following"]["loose"]["instructions"]["difference"] for one in (first, second)
    ]

    text = format_report(report)
    assert f"over 2 runs                 mean      std   difference from {tiny_model_dir}" in text
    assert f"  all loss               {loss['mean']:9.4f} {loss['std']:8.4f}   " in text


def test_a_measure_that_one_run_lacks_has_no_mean():
    one = {"splits": {"test": {"loss": 1.0}, "eval": {"loss": 2.0}}}
    assert over_runs([one, {"splits": {"test": {"loss": 2.0}}}]) == {
        "test loss": {"values": [1.0, 2.0], "mean": 1.5, "std": pytest.approx(0.5**0.5), "difference": None}
    }


def test_runs_that_differ_in_more_than_their_seed_are_told(capsys):
    runs = [("best", "run", Config(seed=seed, device="cpu", output_dir=str(seed))) for seed in (1, 2)]
    eval_command.warn_of_other_settings([*runs, ("model", None, Config(lr=1.0))])  # a model is no run
    assert capsys.readouterr().err == ""
    eval_command.warn_of_other_settings([*runs, ("best", "run", Config(lr=1.0, model="other"))])
    said = [f"warning: the runs differ in {flag} too, not only in their seed" for flag in ("--model", "--lr")]
    assert capsys.readouterr().err.splitlines() == said


@pytest.mark.parametrize("flag", [["--chat"], ["--html", "page.html"]])
def test_what_is_about_one_run_refuses_several(tiny_model_dir, flag):
    with pytest.raises(UserError, match="is about one run; name one"):
        eval_command.main([str(tiny_model_dir), str(tiny_model_dir), *flag])
