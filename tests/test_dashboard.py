"""What TensorBoard is told: texts that show what they should, and measurements of an update."""

import pytest
import torch

from conversations.masking import Example
from evaluation.generation import Answer
from running.dashboard import LAYOUT, answer_text, curves_of, escaped, masked_table
from running.meter import StepMeter, watched
from tests.conftest import tiny_llama
from train import make_optimizer


def test_a_masked_conversation_is_a_table_of_context_and_supervised_text(tiny_tokenizer):
    ids = tiny_tokenizer("a|b<c>\nd", return_tensors="pt")["input_ids"][0]
    labels = ids.clone()
    labels[:4] = -100
    assert masked_table(Example(ids, labels), tiny_tokenizer).splitlines() == [
        "| context | supervised |",
        "|---|---|",
        "| a\\|b&lt; | |",
        "| | c>d |".replace(">d", "><br>d"),
    ]


def test_markdown_in_a_text_stays_text():
    assert escaped("**a** <b> `c` | [d](e)\nf") == "\\*\\*a\\*\\* &lt;b> \\`c\\` \\| \\[d\\](e)<br>f"
    assert answer_text(Answer("q", "one\ntwo", False, 3, True)) == "*greedy, 3 tokens:*\n\n> one<br>two …"


def test_an_update_is_split_into_its_parts():
    line = {"loss": 1.0, "tokens": 10, "supervised_tokens": 4, "seconds": 3.0, "epoch": 1.0, "compiled_graphs": 2}
    curves = curves_of("train", {**line, "seconds_data": 0.5, "seconds_optimizer": 1.0, "peak_memory": 2e9})
    assert curves == {
        "train/loss": 1.0,
        "data/tokens": 10,
        "data/supervised_share": 0.4,
        "time/waiting": 0.5,
        "time/optimizer": 1.0,
        "time/forward_backward": 1.5,
        "memory/peak_gb": 2.0,
    }
    assert curves_of("test", {"loss": 1.0}) == {}
    assert [len(charts) for charts in LAYOUT.values()] == [2, 3, 4, 2]


def test_the_meter_measures_how_far_a_step_moves_the_weights():
    model = tiny_llama(259, num_hidden_layers=5)
    assert list(watched(model)) == [f"layers.{layer}.mlp.down_proj" for layer in (0, 2, 4)]
    optimizer = make_optimizer(model, 0.1)
    meter, weights = StepMeter(model, optimizer), model.model.layers[2].mlp.down_proj.weight
    meter.measuring, before = True, weights.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    expected = (weights - before).norm() / before.norm()
    assert meter.ratios["layers.2.mlp.down_proj"].item() == pytest.approx(expected.item()) != 0
    assert meter.seconds > 0
    meter.measuring, meter.ratios = False, {}
    optimizer.step()
    assert meter.ratios == {}
