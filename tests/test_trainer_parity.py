"""Our loop and `transformers.Trainer` on the same work: the same loss, gradient norm, learning rate and order of
conversations in every update, and the same weights in the end.

Each case is written in `TrainingArguments`; OUR_NAMES translates. `Trainer` runs the reference experiment's masking and
collator (tests/reference.py), which share no code with ours.
"""

import json
import random

import pytest
import torch
from datasets import Dataset
from test_data import quickstart_conversations
from torch.utils.data import SequentialSampler
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

import train
from config import QUICKSTART_MODEL, Config
from conversations.masking import IGNORE, encode
from eval import evaluate
from model import Precision, load_model, token_loss
from storage import hub
from tests import parity, reference
from tests.conftest import layout_of, one_batch, tiny_llama
from tests.mixture import tiny_mixture

OUR_NAMES = {"num_train_epochs": "epochs", "learning_rate": "lr", "lr_scheduler_type": "schedule"} | {
    name: name
    for name in "max_steps warmup_steps weight_decay adam_beta2 max_grad_norm gradient_checkpointing seed".split()
}
# Windows of 8 in micro-batches of 2; the 21 conversations leave a last window of 5 and in it a last micro-batch of 1.
USUAL = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "warmup_steps": 2}
CASES = {
    "accumulation over 4 micro-batches": {},
    "no accumulation": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "one conversation at a time": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "one conversation an update": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
    "no warm-up": {"warmup_steps": 0},
    "three epochs": {"num_train_epochs": 3},
    "ended by max_steps": {"max_steps": 4},
    "strong weight decay": {"weight_decay": 1.0},
    "no weight decay": {"weight_decay": 0.0},
    "clipping never bites": {"max_grad_norm": 100.0},
    "clipping off": {"max_grad_norm": 0.0},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "another seed": {"seed": 7},
    "ten times the learning rate": {"learning_rate": 2e-3},
    "linear, after a share of the updates": {"lr_scheduler_type": "linear", "warmup_steps": 0.2},
    "beta2 of 0.95": {"adam_beta2": 0.95},
}
# Relative; for weights to the learning rates in fp32 and absolute in fp64. Learning rate and order are exact.
TOLERANCES = {
    torch.float32: {"loss": 1e-5, "grad_norm": 1e-5, "weights": 1e-4},
    torch.float64: {"loss": 1e-12, "grad_norm": 1e-12, "weights": 1e-12},
}
CPU = torch.device("cpu")
WORDS = ["a", "an", "the", "cat", "dog", "bird", "sat", "ran", "sang", "on", "under", "far", "today"]


def conversations(n, seed=0):
    """Well-formed conversations of one to three turns and very different lengths, no two alike."""
    draw = random.Random(seed)

    def text():
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))

    def turns(number):
        return [(role, f"{number} {text()}") for _ in range(draw.randint(1, 3)) for role in ("user", "assistant")]

    return [[{"role": role, "content": content} for role, content in turns(number)] for number in range(n)]


def a_model(dtype=torch.float32):
    """The tiny model without a padding token, as SmolLM2's base is; what one would do: test_trainer_differences.py."""
    return tiny_llama(259, pad_token_id=None).to(dtype)


def our_settings(arguments, **named):
    """A `Config` that asks for what `TrainingArguments` ask for."""
    window = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    named |= {OUR_NAMES[name]: value for name, value in arguments.items() if name in OUR_NAMES}
    dtype = next((name for name in ("bf16", "fp16") if arguments.get(name)), "fp32")
    return Config(**named, batch_size=window, dtype=dtype, eval_every=1000)


def both(tokenizer, directory, arguments, examples=None, model=a_model, dtype=torch.float32):
    """Train with both loops; returns what `parity.compare` takes."""
    arguments = USUAL | arguments
    chats = conversations(21)
    rows = [reference.encode(chat, tokenizer) for chat in chats]
    if examples:
        rows = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in examples]
    examples = examples or encode(chats, tokenizer)
    theirs, our = model(dtype), model(dtype)  # two of the same, in this order
    with parity.GradientFloor(theirs) as floor:
        trainers, _ = reference.train(theirs, rows, [], tokenizer.pad_token_id, directory / "trainer", **arguments)
    config = our_settings(arguments, output_dir=str(directory / "ours"), micro_batch_tokens=400)
    ours = parity.train(our, examples, tokenizer, config)
    return ours, trainers, our, theirs, floor.values if dtype == torch.float32 else None


# --- update by update


# What these change is seen in fp64 to 1e-12; in fp32 it is the same arithmetic.
SEEN_IN_FP64 = {
    "one conversation an update",
    "no warm-up",
    "ended by max_steps",
    "strong weight decay",
    "no weight decay",
    "clipping never bites",
    "another seed",
    "beta2 of 0.95",
}


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        pytest.param(
            arguments,
            dtype,
            id=f"{name}-{'fp64' if dtype == torch.float64 else 'fp32'}",
            marks=pytest.mark.slow if dtype == torch.float32 and name in SEEN_IN_FP64 else (),
        )
        for name, arguments in CASES.items()
        for dtype in TOLERANCES
    ],
)
def test_every_update_is_that_of_trainer(tiny_tokenizer, tmp_path, arguments, dtype):
    runs = both(tiny_tokenizer, tmp_path, arguments, dtype=dtype)
    parity.compare(*runs, **TOLERANCES[dtype])


@pytest.mark.parametrize("n", [16, 20, 23, 17, 5])
def test_a_short_last_window_is_that_of_trainer(tiny_tokenizer, tmp_path, n):
    """No short window; one of 4; one of 7, with a short micro-batch; one of a single conversation; nothing else."""
    runs = both(tiny_tokenizer, tmp_path, {}, examples=encode(conversations(n), tiny_tokenizer))
    assert [len(update.conversations) for update in runs[0]] == 2 * [min(8, n - i) for i in range(0, n, 8)]
    parity.compare(*runs)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "fp64"])
def test_rows_that_no_template_makes_are_trained_as_trainer_trains_them(tiny_tokenizer, tmp_path, ragged_window, dtype):
    """Some of the rows are supervised from their first token, one not at all, one has two tokens."""
    assert any(example.labels[0] != IGNORE for example in ragged_window)
    assert any(example.supervised_tokens == 0 for example in ragged_window)
    runs = both(tiny_tokenizer, tmp_path, {}, examples=ragged_window, dtype=dtype)
    parity.compare(*runs, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "fp64"])
def test_weights_that_a_window_does_not_reach_are_left_alone_by_both(tiny_tokenizer, tmp_path, dtype):
    """Experts that are modules, and a weight that takes part in nothing. Padding would reach experts: there is none."""
    arguments = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "weight_decay": 1.0}
    runs = both(tiny_tokenizer, tmp_path, arguments, model=lambda kind: tiny_mixture(259).to(kind), dtype=dtype)
    ours, theirs, initial = (dict(model.named_parameters()) for model in (*runs[2:4], tiny_mixture(259).to(dtype)))
    for name in ("unused.weight", "mlp.experts.5.up_proj.weight"):
        name = f"model.layers.0.{name}"
        assert torch.equal(ours[name], initial[name])
        assert torch.equal(theirs[name], initial[name])
    parity.compare(*runs, **TOLERANCES[dtype])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_autocast_is_near_that_of_trainer(tiny_tokenizer, tmp_path, precision):
    """Looser tolerances: rows padded to other lengths are summed in another order, and bf16 keeps 8 bits of each sum.

    On a CPU, `Trainer` runs fp16 without a loss scale; ours has one, which is a power of two and changes nothing.
    """
    runs = both(tiny_tokenizer, tmp_path, {precision: True})
    parity.compare(*runs, loss=1e-4, grad_norm=1e-2, weights=0.2)


def test_a_checkpoint_stored_in_bf16_is_trained_in_fp32_by_both(tiny_tokenizer, tmp_path):
    a_model(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    ours = load_model(tmp_path / "bf16", tiny_tokenizer, CPU, local_files_only=True)
    in_turn = iter([theirs, ours])
    runs = both(tiny_tokenizer, tmp_path, {}, model=lambda _: next(in_turn))
    assert {weights.dtype for model in runs[2:4] for weights in model.parameters()} == {torch.float32}
    parity.compare(*runs)


def test_the_whole_program_is_trainer(tiny_tokenizer, tmp_path):
    """`python train.py` on a file, from its flags to its files, against the reference's own way to the same."""
    chats = conversations(60)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    a_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    flags = "--lr 5e-4 --batch-size 8 --warmup-steps 2 --dtype fp32 --micro-batch-tokens 400 --eval-every 100"
    paths = ["--dataset", tmp_path / "chats.jsonl", "--model", tmp_path / "model", "--output-dir", tmp_path / "run"]
    shares = "--eval-fraction 0.05 --test-fraction 0.05 --save-every 14"
    assert train.main([*map(str, paths), *flags.split(), *shares.split()]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [reference.Update(m["loss"], m["grad_norm"], m["lr"], []) for m in lines if m["kind"] == "train"]

    held_out = Dataset.from_list([{"messages": chat} for chat in chats]).train_test_split(test_size=0.1, seed=42)
    evaluated = held_out["test"].train_test_split(test_size=0.5, seed=42)["train"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows, eval_rows = (
        [reference.encode(messages, tokenizer) for messages in split["messages"]]
        for split in (held_out["train"], evaluated)
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with parity.GradientFloor(model) as floor:
        trainers, eval_loss = reference.train(
            model, rows, eval_rows, tokenizer.pad_token_id, tmp_path / "trainer", **USUAL, learning_rate=5e-4
        )
    for update in trainers:
        update.conversations = []  # metrics.jsonl does not name them
    last = tmp_path / "run" / "checkpoints" / "step-14" / "model"
    our_model = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32)
    assert len(ours) == 14
    parity.compare(ours, trainers, our_model, model, floor.values)
    examples = encode(evaluated["messages"], tiny_tokenizer)
    assert trainers_eval_loss(our_model, examples, batch_size=4) == pytest.approx(eval_loss, rel=1e-6)


# --- what the updates are made of


def trainers_eval_loss(model, examples, batch_size):
    """`Trainer`'s eval loss, out of ours: the mean over examples of the mean token loss of each example's batch."""
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    losses = [evaluate(model, batch, layout_of(packed=False), Precision("fp32", CPU)).loss for batch in batches]
    return sum(len(batch) * loss for batch, loss in zip(batches, losses, strict=True)) / len(examples)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_eval_loss_of_trainer_follows_from_ours(tiny_tokenizer, tmp_path, batch_size):
    chats, model = conversations(5, seed=1), a_model()
    rows = [reference.encode(chat, tiny_tokenizer) for chat in chats]
    arguments = USUAL | {"max_steps": 1, "per_device_eval_batch_size": batch_size}
    _, eval_loss = reference.train(model, rows, rows, tiny_tokenizer.pad_token_id, tmp_path, **arguments)
    assert trainers_eval_loss(model, encode(chats, tiny_tokenizer), batch_size) == pytest.approx(eval_loss, rel=1e-6)


def test_trainer_computes_our_loss_from_our_labels(tiny_model, ragged_window, tmp_path):
    batch = reference.collator(0)(
        [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in ragged_window]
    )
    tokens = sum(example.supervised_tokens for example in ragged_window)
    trainer = Trainer(tiny_model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    theirs = trainer.compute_loss(tiny_model, batch, num_items_in_batch=torch.tensor(tokens))
    assert token_loss(tiny_model, one_batch(ragged_window)).item() / tokens == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gpt_oss"])  # biases and norms in different places
def test_what_decays_is_what_decays_with_trainer(kind, tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 259}
    shape |= {"intermediate_size": 32, "num_local_experts": 2, "num_key_value_heads": 4} if kind == "gpt_oss" else {}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape))
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    decayed = {id(weights) for weights in train.make_optimizer(model, 0.1).param_groups[0]["params"]}
    ours = {name for name, weights in model.named_parameters() if id(weights) in decayed}
    theirs = set(trainer.get_decay_parameter_names(model)) & dict(model.named_parameters()).keys()
    assert ours == {name for name in theirs if not name.endswith(".sinks")}  # test_trainer_differences.py has these


def test_real_weights_on_real_conversations(real_tokenizer, tmp_path):
    """SmolLM2-135M, two updates; with more of them: `python -m benchmarks.trainer_parity`."""
    path, local_files_only = hub.find_model(QUICKSTART_MODEL)
    chats = [chat for chat in quickstart_conversations() if not reference.mistakes(chat, real_tokenizer)]
    short = sorted(encode(chats, real_tokenizer), key=lambda example: len(example.input_ids))[40:44]
    arguments = {"gradient_accumulation_steps": 1, "warmup_steps": 0, "num_train_epochs": 1}

    def model(_):
        return load_model(path, real_tokenizer, CPU, local_files_only)

    runs = both(real_tokenizer, tmp_path, arguments, examples=short, model=model)
    assert len(runs[0]) == 2
    parity.compare(*runs, weights=1e-2)  # the worst of 134 million


# --- a Trainer that has changed: the comparison fails, and names what moved


def linear_scheduler(self, num_training_steps, optimizer=None):
    self.lr_scheduler = get_linear_schedule_with_warmup(optimizer or self.optimizer, 2, num_training_steps)


def norm_after_clipping(self, *arguments, real=Trainer._get_grad_norm, **options):
    return min(1.0, real(self, *arguments, **options))


def log_without_norm(self, logs, *arguments, real=Trainer.log):
    real(self, {name: value for name, value in logs.items() if name != "grad_norm"}, *arguments)


CHANGES = {
    "create_scheduler": (linear_scheduler, "^learning_rate: Trainer of .* in update 4, .* relative difference"),
    "_get_train_sampler": (lambda _, rows=None: SequentialSampler(rows), "^conversations: .* sees others in update 1"),
    "_get_num_items_in_batch": (lambda *_: None, "^loss: .* in update 1"),  # a mean of means
    "_get_grad_norm": (norm_after_clipping, "^grad_norm: .* in update 1"),
    "get_decay_parameter_names": (  # every one; update 3 is the second that had a learning rate above 0
        lambda _, model: [name for name, _ in model.named_parameters()],
        "^grad_norm: .* in update 3",
    ),
    "log": (log_without_norm, r"no longer logs \['grad_norm'\]"),
}


@pytest.mark.parametrize("method", CHANGES)
def test_a_changed_trainer_is_named_by_what_moved(tiny_tokenizer, tmp_path, monkeypatch, method):
    changed, complaint = CHANGES[method]
    monkeypatch.setattr(Trainer, method, changed)
    with pytest.raises(AssertionError, match=complaint):
        parity.compare(*both(tiny_tokenizer, tmp_path, {}))


def test_another_number_of_updates_and_other_weights_are_named(tiny_tokenizer, tmp_path):
    ours, trainers, our_model, trainers_model, floor = both(tiny_tokenizer, tmp_path, {})
    assert all(update.grad_norm > 1.5 for update in trainers)  # clipping at 1 bites in the cases above
    with pytest.raises(AssertionError, match=r"^number of updates: .* made 5, we made 6"):
        parity.compare(ours, trainers[:-1], our_model, trainers_model, floor)
    with torch.no_grad():
        trainers_model.model.norm.weight[0] += 2e-6
    with pytest.raises(AssertionError, match=r"^weights: .* ends up to .* from ours, tolerance 1e-04"):
        parity.compare(ours, trainers, our_model, trainers_model, floor)
