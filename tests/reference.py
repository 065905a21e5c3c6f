"""The reference experiment, written again from its description: its masking and its collator under `Trainer`.

It shares no code with the product, so that whoever knows `Trainer` can check one against the other.
"""

import contextlib
import copy
import itertools
import tempfile
from dataclasses import dataclass
from unittest import mock

import torch
import transformers
from datasets import Dataset
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments


def encode(messages, tokenizer):
    """ChatML as one text, encoded at once; from each user marker to the end of an assistant marker, labels are -100."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"input_ids": ids, "labels": mask(ids, tokenizer)}


def mask(ids, tokenizer):
    """The labels of some ids: the n-th user marker found and the n-th assistant marker found bound the n-th mask."""
    user, assistant = (
        tokenizer(f"<|im_start|>{role}\n", add_special_tokens=False)["input_ids"] for role in ("user", "assistant")
    )
    starts = [i for i in range(len(ids)) if ids[i : i + len(user)] == user]
    ends = [i + len(assistant) for i in range(len(ids)) if ids[i : i + len(assistant)] == assistant]
    labels = list(ids)
    for start, end in zip(starts, ends):  # noqa: B905 (the reference's own: what has no partner is left out)
        for i in range(start, end):
            labels[i] = -100
    return labels


def encode_by_offsets(messages, tokenizer):
    """ChatML encoded at once, the labels by where in the text each token stands: another way to the same definition."""
    text, spans = "", []
    for message in messages:
        text += f"<|im_start|>{message['role']}\n"
        end = len(text) + len(f"{message['content']}<|im_end|>\n")
        spans += [(len(text), end)] if message["role"] == "assistant" else []
        text += f"{message['content']}<|im_end|>\n"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        number if any(begin <= first and last <= end for begin, end in spans) else -100
        for number, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def encode_by_definition(messages, tokenizer, ends, tools=None):
    """Examples by the definition of docs/masking.md, from rendered texts and the offsets of their tokens.

    For each answer the context is what the template renders before it with the generation prompt; the answer is what it
    renders after that, to the last of `ends` that only space and control tokens follow. Answers whose text begins
    another's share its example. Each is supervised once, in the first example that has it.

    Args:
        messages: as the template takes them.
        ends: the control tokens that may end a turn.

    Returns:
        A list of `(ids, labels)`; None where the template cannot write an answer so.
    """

    def render(chat, prompt=False):
        return tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=prompt)

    spans, whole = {}, render(messages)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            context, text = render(messages[:number], prompt=True), render(messages[: number + 1])
            if not text.startswith(
                context
            ):  # then the answer is what follows where it begins to depend on what is said
                other = render([*messages[:number], {"role": "assistant", "content": "\ue000"}])
                common = next(at for at, pair in enumerate(zip(text, other, strict=False)) if len({*pair}) > 1)
                begins = (at for at in range(common, common - 4, -1) if context.endswith(text[at - 8 : at]))
                begin = next(begins, None)
                if begin is None:
                    return None
                text = context + text[begin:]
            stop = max(text.rfind(end) + len(end) for end in ends if text.rfind(end) >= len(context))
            spans[text[:stop]] = (len(context), stop)
    longest = [text for text in spans if not any(other != text and other.startswith(text) for other in spans)]
    longest = [whole if whole.startswith(text) else text for text in longest]
    seen, rows = set(), []
    for text in longest:
        own = [text_of_one for text_of_one in spans if text.startswith(text_of_one)]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        supervised = [spans[one] for one in own if one not in seen]
        seen.update(own)
        rows.append(
            (
                encoded["input_ids"],
                [
                    number if any(begin <= first and last <= end for begin, end in supervised) else -100
                    for number, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
                ],
            )
        )
    return rows


def encode_with_trl(conversations, tokenizer, template="qwen3_instruct_2507"):
    """The rows that TRL's `SFTTrainer` makes of conversations with `assistant_only_loss=True` and a template it knows.

    The default one is plain ChatML, which TRL does not know under its own name.
    """
    import trl

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = getattr(trl.chat_template_utils, template + "_chat_template")
    nothing = LlamaForCausalLM(LlamaConfig(hidden_size=2, num_hidden_layers=0, num_attention_heads=1))
    with tempfile.TemporaryDirectory() as directory:
        settings = {"assistant_only_loss": True, "max_length": None, "report_to": "none", "bf16": False}
        arguments = trl.SFTConfig(directory, use_cpu=True, **settings)
        rows = Dataset.from_list([{"messages": messages} for messages in conversations])
        trainer = trl.SFTTrainer(nothing, arguments, train_dataset=rows, processing_class=tokenizer)
        return trainer.train_dataset.to_list()


def mistakes(messages, tokenizer):
    """The named ways in which the reference's rule gets a conversation wrong; none where it is well formed."""
    roles = [message["role"] for message in messages]
    contents = [message["content"] for message in messages]
    turns = [role for role in roles if role != "system"]
    in_a_row = [first for first, second in itertools.pairwise(turns) if first == second]
    special = [token for token in tokenizer.get_added_vocab()]
    found = {
        "system text is trained": "system" in roles,
        "the first question is trained": turns[:1] == ["assistant"],
        "a question without an answer is trained": turns[-1:] == ["user"],
        "after two questions in a row an answer is not trained": "user" in in_a_row,
        "after two answers in a row a header is trained": "assistant" in in_a_row,
        "a control token in a text is taken for one": any(token in text for text in contents for token in special),
        "whitespace that opens a text hides its header": any(text != text.lstrip() for text in contents),
    }
    return [name for name, is_so in found.items() if is_so]


def collator(pad_id):
    """A `data_collator` for `Trainer`: pads rows on the right to the longest of the batch."""

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name, value):
            return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

        ones = [{"ones": [1] * len(row["input_ids"])} for row in rows]
        attention_mask = torch.tensor([row["ones"] + [0] * (longest - len(row["ones"])) for row in ones])
        return {
            "input_ids": padded("input_ids", pad_id),
            "labels": padded("labels", -100),
            "attention_mask": attention_mask,
        }

    return collate


@dataclass
class Update:
    """What an optimizer update was, whoever made it."""

    loss: float
    grad_norm: float  # before clipping
    learning_rate: float
    conversations: list  # the ids of each conversation that went through the model


class Witness:
    """Looks at what goes through a model in training, and cuts it into updates when told that one has ended."""

    def __init__(self, model):
        self.seen, self.updates = [], []
        model.base_model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module, _args, batch):
        if module.training:
            rows = batch["input_ids"]
            if "cu_seqlens" in batch:  # ours, packed
                conversations = rows[0].split(batch["cu_seqlens"].diff().tolist())
            else:
                conversations = [ids[kept.bool()] for ids, kept in zip(rows, batch["attention_mask"], strict=True)]
            self.seen += [tuple(ids.tolist()) for ids in conversations]

    def update_ended(self, loss, grad_norm, learning_rate):
        self.updates.append(Update(loss, grad_norm, learning_rate, self.seen))
        self.seen = []


class Listener(TrainerCallback):
    """Tells a `Witness` what `Trainer` logs of each update."""

    def __init__(self, witness):
        self.witness = witness

    def on_log(self, args, state, control, logs, **_):  # noqa: ARG002
        if "train_runtime" in logs or "eval_loss" in logs:
            return
        missing = {"loss", "grad_norm", "learning_rate"} - logs.keys()
        assert not missing, f"Trainer of transformers {transformers.__version__} no longer logs {sorted(missing)}"
        self.witness.update_ended(logs["loss"], logs["grad_norm"], logs["learning_rate"])


def train(model, rows, eval_rows, pad_id, directory, **arguments):
    """Train a model with `transformers.Trainer` and the reference's settings.

    Args:
        rows, eval_rows: dicts of `input_ids` and `labels`, lists of ids.
        arguments: `TrainingArguments` that differ from the reference's.

    Returns:
        The list of its `Update`s, and the eval loss at the end; None without `eval_rows`.
    """
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 8,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 12,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 42,
        "use_cpu": next(model.parameters()).device.type == "cpu",
        "disable_tqdm": True,
    }
    double = next(model.parameters()).dtype == torch.float64
    witness = Witness(model)
    with default_dtype(torch.float64) if double else contextlib.nullcontext():
        trainer = Trainer(
            model,
            TrainingArguments(str(directory), **(settings | arguments)),
            data_collator=collator(pad_id),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
            callbacks=[Listener(witness)],
            compute_loss_func=double_loss if double else None,
        )
        trainer.remove_callback(PrinterCallback)  # the witness keeps what it would print
        with mock.patch("gc.collect"):  # accelerate's, at the end, which takes as long as a small run
            trainer.train()
        return witness.updates, trainer.evaluate()["eval_loss"] if eval_rows else None


def double_loss(outputs, labels, num_items_in_batch):
    """The loss of `Trainer` in fp64: its models' own rounds the logits to fp32."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch


@contextlib.contextmanager
def default_dtype(dtype):
    """Have `Trainer` add up its losses, which it does in torch's default type, in another."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)
