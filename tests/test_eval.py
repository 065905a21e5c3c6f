"""Evaluation that does not depend on batching, answers that stop by themselves and disturb nothing, and the command."""

import json

import pytest
import torch

import eval as eval_command
from compute.self_check import use_layout
from config import UserError
from eval import Evaluation, answer, evaluate, read_prompts
from model import Precision
from tests.conftest import layout_of, tiny_llama

FP32 = Precision("fp32", torch.device("cpu"))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 30, 130, 10_000])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_the_loss_is_the_same_for_every_batch_size(ragged_window, budget, packed, dtype, bar):
    model = tiny_llama(259).to(dtype)
    whole = evaluate(model, ragged_window, layout_of(packed=False), FP32)
    use_layout(model, layout_of(packed))
    cut = evaluate(model, ragged_window, layout_of(packed, budget), FP32)
    assert cut.loss == pytest.approx(whole.loss, rel=bar)
    assert (cut.tokens, cut.correct) == (whole.tokens, whole.correct)
    assert cut.tokens == sum(example.supervised_tokens for example in ragged_window)


def test_a_mean_of_batch_means_would_depend_on_the_batch_size(ragged_window):
    """The control: what `Trainer` reports for these rows moves with its batch size."""
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
    result = Evaluation(loss_sum=6.0, tokens=3, correct=1)
    assert (result.loss, result.accuracy) == (2.0, 1 / 3)
    assert result.perplexity == pytest.approx(7.38905609893065)
    assert Evaluation(1e9, 1, 0).perplexity > 1e300


def test_answers_are_seeded_and_leave_the_random_state_alone(tiny_model, tiny_tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (answer(tiny_model, tiny_tokenizer, "Hi", seed=seed, max_new_tokens=8) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other
    assert not first.finished
    assert first.tokens == 8


def test_an_answer_ends_at_the_stop_token(tiny_model, tiny_tokenizer):
    with torch.no_grad():  # a head that always says <|im_end|>: the last hidden state is made its embedding
        tiny_model.model.norm.weight.zero_()
        tiny_model.lm_head.weight = torch.nn.Parameter(tiny_model.lm_head.weight.clone())
        tiny_model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tiny_tokenizer)))
        tiny_model.lm_head.bias[tiny_tokenizer.eos_token_id] = 1.0
    said = answer(tiny_model, tiny_tokenizer, "Hi", greedy=True)
    assert (said.text, said.finished, said.tokens) == ("", True, 1)


def test_a_prompt_may_be_a_file_of_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    assert list(read_prompts(["zero", str(tmp_path / "prompts.txt")])) == ["zero", "one", "two"]


def test_the_command_compares_two_models_on_a_whole_file(tiny_model_dir, chats, capsys):
    arguments = [str(tiny_model_dir), "--dataset", str(chats), "--against", str(tiny_model_dir)]
    assert eval_command.main([*arguments, "--json", "--prompts", "Hi", "--max-new-tokens", "4", "--greedy"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["splits"].keys() == {"all"}
    assert report["splits"]["all"].keys() == {"loss", "perplexity", "accuracy", "supervised_tokens"}
    assert {**report, "against": None} == {**report["against"], "against": None}
    assert [given["prompt"] for given in report["answers"]] == ["Hi"]

    assert eval_command.main([*arguments, "--prompts", "Hi", "--max-new-tokens", "4"]) == 0
    text = capsys.readouterr().out
    assert text.count("all   loss ") == 2
    assert "> Hi" in text


def test_a_model_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="there is no such directory"):
        eval_command.main(["./nowhere", "--preset", "quickstart"])
