"""Evaluation that does not depend on batching, and the command."""

import json

import pytest
import torch

import eval as eval_command
from compute.self_check import use_layout
from config import UserError
from eval import Evaluation, evaluate
from evaluation.texts import load_text, read_prompts, slice_text
from model import Precision
from tests.conftest import layout_of, tiny_llama

FP32 = Precision("fp32", torch.device("cpu"))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 130])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_the_loss_is_the_same_for_every_batch_size(ragged_window, budget, packed, dtype, tolerance):
    model = tiny_llama(259).to(dtype)
    together = evaluate(model, ragged_window, layout_of(packed=False), FP32)
    use_layout(model, layout_of(packed))
    cut = evaluate(model, ragged_window, layout_of(packed, budget), FP32)
    assert cut.loss == pytest.approx(together.loss, rel=tolerance)
    assert (cut.tokens, cut.correct) == (together.tokens, together.correct)
    assert cut.tokens == sum(example.supervised_tokens for example in ragged_window)


def test_a_mean_of_batch_means_would_depend_on_the_batch_size(ragged_window):
    """The control: what `Trainer` reports for these rows depends on its batch size."""
    model, rows = tiny_llama(259), [example for example in ragged_window if example.supervised_tokens][:6]

    def mean_of_means(size):
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        return sum(evaluate(model, batch, layout_of(packed=False), FP32).loss for batch in batches) / len(batches)

    assert abs(mean_of_means(2) - mean_of_means(3)) > 1e-3


def test_evaluation_leaves_the_model_as_it_was(tiny_model, ragged_window):
    tiny_model.train()
    evaluate(tiny_model, ragged_window, layout_of(packed=False), FP32)
    assert tiny_model.training
    assert all(weights.grad is None for weights in tiny_model.parameters())


def test_perplexity_and_accuracy_are_means_over_tokens():
    report = Evaluation(loss_sum=6.0, tokens=3, correct=1).report()
    assert (report["loss"], report["accuracy"], report["supervised_tokens"]) == (2.0, 1 / 3, 3)
    assert report["perplexity"] == pytest.approx(7.38905609893065)
    assert Evaluation(1e9, 1, 0).report()["perplexity"] > 1e300


def test_a_prompt_may_be_a_file_of_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\u2028still\n", encoding="utf-8")
    assert read_prompts(["zero", str(tmp_path / "prompts.txt")]) == ["zero", "one", "two\u2028still"]


def test_the_command_compares_two_models_on_a_file(tiny_model_dir, chats, capsys):
    arguments = [str(tiny_model_dir), "--dataset", str(chats), "--against", str(tiny_model_dir)]
    assert eval_command.main([*arguments, "--json", "--prompts", "Hi", "--max-new-tokens", "4", "--greedy"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["splits"].keys() == {"all"}
    assert report["splits"]["all"].keys() == {"loss", "perplexity", "accuracy", "supervised_tokens"}
    comparison = report.pop("comparison")["all"]
    assert {**report, "against": None} == {**report["against"], "against": None}
    assert (comparison["difference"], comparison["interval"]) == (0.0, [0.0, 0.0])
    assert (comparison["won"], comparison["lost"], comparison["tied"]) == (0, 0, 40)
    assert comparison["better"] == comparison["worse"] == []
    assert [given["prompt"] for given in report["answers"]] == ["Hi"]

    assert eval_command.main([*arguments, "--prompts", "Hi", "--max-new-tokens", "4"]) == 0
    text = capsys.readouterr().out
    assert text.count("all   loss ") == 2
    assert "> Hi" in text


def test_a_missing_model_is_refused():
    with pytest.raises(UserError, match="there is no such directory"):
        eval_command.main(["./nowhere", "--preset", "quickstart"])


def reported(capsys, *arguments):
    """The report of `eval.py --json`, and its warnings."""
    assert eval_command.main([*map(str, arguments), "--json", "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_a_prompt_may_be_longer_than_a_file_name(tiny_model_dir, chats, capsys):
    report, _ = reported(capsys, tiny_model_dir, "--dataset", chats, "--prompts", "word " * 60)
    assert report["answers"][0]["prompt"] == "word " * 60


def test_an_invalid_file_of_prompts_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "blank.txt").write_bytes(b" \n")
    (tmp_path / "directory").mkdir()
    for name, message in (
        ("latin.txt", "not UTF-8 at byte 4; save it as UTF-8"),
        ("blank.txt", "there are no prompts in it"),
        ("missing.txt", "No such file or directory"),
        ("directory", "Is a directory"),
    ):
        with pytest.raises(UserError) as raised:
            read_prompts([str(tmp_path / name)])
        assert str(raised.value) == f"--prompts {tmp_path / name}: {message}"


def test_a_byte_order_mark_and_other_line_ends_are_not_part_of_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_prompts([str(tmp_path / "prompts.txt")]) == ["one", "two"]


def test_a_prompt_longer_than_the_context_length_is_refused(tiny_model_dir, chats):
    arguments = [str(tiny_model_dir), "--dataset", str(chats), "--prompts", "Hi", "word " * 99]
    with pytest.raises(
        UserError, match="prompt 2 has 514 tokens and --max-new-tokens asks for 50 more, but the context"
    ):
        eval_command.main(arguments)
    with pytest.raises(UserError, match="prompt 1 has 21 tokens and --max-new-tokens asks for 500 more"):
        eval_command.main([*arguments[:3], "--prompts", "Hi", "--max-new-tokens", "500"])


# --- plain text


@pytest.mark.parametrize("length", [2, 3, 33, 64, 65])
def test_every_token_of_a_text_but_the_first_is_scored_once(length):
    ids = torch.arange(65)
    scored = [
        token for one in slice_text(ids, length, length // 2) for token in one.labels[1:][one.supervised[1:]].tolist()
    ]
    assert scored == list(range(1, 65))
    for number, one in enumerate(slice_text(ids, length, length // 2)):
        assert len(one.input_ids) <= length
        first = 1 + int(one.supervised[1:].int().argmax())  # how many tokens it is predicted from
        assert number == 0 or first >= length // 2


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_loss_of_a_text_is_that_of_its_tokens(packed):
    model, ids = tiny_llama(259).double(), torch.randint(3, 259, (100,), generator=torch.Generator().manual_seed(0))
    logits = model(ids[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[1:]).item()
    use_layout(model, layout_of(packed))
    found = evaluate(model, slice_text(ids, 100, 50), layout_of(packed), FP32)
    assert (found.loss, found.tokens) == (pytest.approx(expected, rel=1e-12), 99)
    cut = evaluate(model, slice_text(ids, 40, 20), layout_of(packed), FP32)
    assert cut.tokens == 99
    torch.testing.assert_close(cut.token_losses[0], found.token_losses[0][:39])  # of the first slice


def test_an_empty_text_is_refused(tmp_path, tiny_tokenizer):
    (tmp_path / "text.txt").touch()
    with pytest.raises(UserError, match="there is no text in it"):
        load_text(tmp_path / "text.txt", tiny_tokenizer)


def test_a_text_holds_no_control_tokens(tmp_path, tiny_tokenizer):
    (tmp_path / "text.txt").write_text("<|im_end|>")
    (one,) = load_text(tmp_path / "text.txt", tiny_tokenizer)
    assert len(one.input_ids) == len("<|im_end|>")


@pytest.mark.parametrize("flag", [["--chat"], ["--html", "page.html"]])
def test_flags_about_one_run_refuse_several_runs(tiny_model_dir, flag):
    with pytest.raises(UserError, match="is about one run; name one"):
        eval_command.main([str(tiny_model_dir), str(tiny_model_dir), *flag])
