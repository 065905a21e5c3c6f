"""What `Trainer` does that we deliberately do not, and one odd thing we keep: the README's table, a test a line."""

import copy
import math

import pytest
import torch
from test_trainer_parity import CPU, USUAL, a_model, both, conversations, trainers_eval_loss
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Trainer, TrainingArguments

import train
from conversations.masking import IGNORE, Example, encode
from eval import evaluate
from model import Precision, load_model
from tests import parity, reference
from tests.conftest import layout_of


def by_trainer(model, rows, tokenizer, directory, **arguments):
    """The updates that `Trainer` makes over some rows."""
    return reference.train(model, rows, [], tokenizer.pad_token_id, directory, **USUAL | arguments)[0]


@pytest.fixture
def rows(tiny_tokenizer):
    return [reference.encode(chat, tiny_tokenizer) for chat in conversations(21)]


def by_us(model, window):
    """One update of ours over a window."""
    precision = Precision("fp32", CPU)
    optimizer, scaler = train.make_optimizer(model, 0.1), precision.grad_scaler()
    window = list(layout_of(packed=False).micro_batches(window))
    return train.train_step(model, optimizer, window, 1e-3, precision=precision, scaler=scaler, max_grad_norm=1.0)


def test_its_eval_loss_depends_on_the_batch_size(tiny_tokenizer):
    model, examples = a_model(), encode(conversations(21), tiny_tokenizer)
    theirs = [trainers_eval_loss(model, examples, batch_size) for batch_size in (1, 4, 21)]
    assert max(theirs) - min(theirs) > 1e-3
    fp32 = Precision("fp32", CPU)
    ours = [evaluate(model, examples, layout_of(False, token_budget), fp32).loss for token_budget in (1, 400, 10_000)]
    assert ours == pytest.approx([ours[0]] * 3, rel=1e-7)


def test_it_logs_nan_as_zero_and_continues(tiny_tokenizer, rows, tmp_path):
    model = a_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    updates = by_trainer(copy.deepcopy(model), rows, tiny_tokenizer, tmp_path)
    assert [update.loss for update in updates] == [0.0] * 6
    with pytest.raises(FloatingPointError, match="loss nan"):
        by_us(model, encode(conversations(8), tiny_tokenizer))


def test_it_makes_an_update_of_a_window_in_which_nothing_is_supervised(tiny_tokenizer, rows, tmp_path):
    masked = [{"input_ids": row["input_ids"], "labels": [IGNORE] * len(row["labels"])} for row in rows[:8]]
    model, before = a_model(), a_model()
    (update,) = by_trainer(model, masked, tiny_tokenizer, tmp_path, warmup_steps=0, num_train_epochs=1)
    assert (update.loss, update.grad_norm) == (0.0, 0.0)
    assert parity.weight_difference(model, before) > 1e-7  # weight decay; later on, momentum too
    window = [Example(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in masked]
    with pytest.raises(ValueError, match="no token of this window is supervised"):
        by_us(model, window)


def test_it_trains_a_checkpoint_in_the_16_bits_it_was_stored_in(tiny_tokenizer, rows, tmp_path):
    a_model(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")  # as most scripts load it
    before = copy.deepcopy(model)
    by_trainer(model, rows, tiny_tokenizer, tmp_path / "trainer")
    norms = [name for name, weights in model.named_parameters() if weights.ndim == 1]
    for name in norms:
        assert model.get_parameter(name).dtype == torch.bfloat16
        assert torch.equal(model.get_parameter(name), before.get_parameter(name))  # 1 - 2e-4 rounds to 1
    ours = load_model(tmp_path / "bf16", tiny_tokenizer, CPU, local_files_only=True)
    assert {weights.dtype for weights in ours.parameters()} == {torch.float32}


def test_a_stop_token_that_is_the_padding_token_too_gets_no_input_gradient(tiny_model_dir, tiny_tokenizer, tmp_path):
    """Such a model (the quickstart's is one) has `nn.Embedding(padding_idx=…)`; we clear that on loading."""
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    assert theirs.config.pad_token_id == tiny_tokenizer.eos_token_id
    ours = load_model(tiny_model_dir, tiny_tokenizer, CPU, local_files_only=True)
    assert parity.weight_difference(ours, theirs) == 0
    in_turn = iter([theirs, ours])
    with pytest.raises(AssertionError, match=r"^grad_norm: .* in update 1"):
        parity.compare(*both(tiny_tokenizer, tmp_path, {}, model=lambda _: next(in_turn)))


def test_it_logs_the_mean_of_several_losses_as_one(tiny_tokenizer, rows, tmp_path):
    """Ours logs the loss of the update that it logs."""
    each = by_trainer(a_model(), rows, tiny_tokenizer, tmp_path)
    third = by_trainer(a_model(), rows, tiny_tokenizer, tmp_path, logging_steps=3)
    assert len(third) == 2
    assert third[0].loss == pytest.approx(sum(update.loss for update in each[:3]) / 3, rel=1e-6)
    assert third[0].grad_norm == each[2].grad_norm


@pytest.mark.parametrize(("kind", "ends"), [("gpt_oss", {"sinks"}), ("mamba2", {"A_log", "D", "weight"})])
def test_weights_of_one_dimension_decay_with_it_unless_their_name_is_a_norms(kind, ends, tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 259, "num_heads": 4}
    shape |= {"head_dim": 16} if kind == "mamba2" else {"num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape))
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    decayed = {name for name in trainer.get_decay_parameter_names(model) if model.get_parameter(name).ndim == 1}
    assert {name.rpartition(".")[2] for name in decayed} == ends  # Mamba's last norm is norm_f.weight
    ours, rest = (group["params"] for group in train.make_optimizer(model, 0.1).param_groups)
    assert {weights.ndim for weights in ours} <= {2, 3}
    assert {id(model.get_parameter(name)) for name in decayed} <= set(map(id, rest))


def test_we_keep_its_first_update_without_a_learning_rate(tiny_tokenizer, tmp_path):
    ours, trainers, our_model, trainers_model, _ = both(tiny_tokenizer, tmp_path, {"max_steps": 1})
    assert ours[0].learning_rate == trainers[0].learning_rate == 0.0
    assert parity.weight_difference(our_model, a_model()) == parity.weight_difference(trainers_model, a_model()) == 0
