"""What TensorBoard shows of a run: which numbers are curves and what they mean, the charts, tables and texts."""

import dataclasses
import itertools
import re

from torch.utils.tensorboard import summary

from config import Config, as_text

# The curves, and what each is. A number that is not here, because it never changes or says the same as another, is in
# metrics.jsonl only.
CURVES = {
    "train/loss": "mean token loss over the update's window",
    "train/lr": "learning rate of the update",
    "train/grad_norm": "gradient norm before clipping",
    "train/overflows": "updates skipped so far because fp16 gradients overflowed",
    "train/tokens_per_second": "tokens of the window / seconds of the update",
    "eval/loss": "mean token loss over the eval split; the lowest chooses the best model",
    "eval/accuracy": "share of the eval split's supervised tokens that the model ranks first",
    "data/supervised_share": "supervised tokens / tokens of the update's window",
    "data/tokens": "tokens of the update's window",
    "time/waiting": "seconds an update waited for its window",
    "time/forward_backward": "seconds of an update's forward and backward passes and clipping",
    "time/optimizer": "seconds of the optimizer's step; on a GPU those of starting it",
    "time/evaluation": "seconds of an evaluation",
    "time/checkpoint": "seconds of writing a checkpoint",
    "time/best": "seconds of writing the best model",
    "memory/peak_gb": "the most memory in use so far: of the GPU by tensors, else of the process",
    "update_ratio": "norm of the update / norm of the weights of this matrix; healthy training is near 0.001",
}

LAYOUT = {
    "1 loss": {
        "loss: train and eval": ["Multiline", [r"(train|eval)/loss"]],
        "accuracy: eval": ["Multiline", [r"eval/accuracy"]],
    },
    "2 optimisation": {
        "learning rate": ["Multiline", [r"train/lr"]],
        "gradient norm, before clipping": ["Multiline", [r"train/grad_norm"]],
        "update-to-weight ratio: first, middle, last layer": ["Multiline", [r"update_ratio/.*"]],
    },
    "3 speed": {
        "tokens a second": ["Multiline", [r"train/tokens_per_second"]],
        "seconds of an update": ["Multiline", [r"time/(waiting|forward_backward|optimizer)"]],
        "seconds of what comes between updates": ["Multiline", [r"time/(evaluation|checkpoint|best)"]],
        "peak memory, GB": ["Multiline", [r"memory/peak_gb"]],
    },
    "4 data": {
        "supervised share of the tokens": ["Multiline", [r"data/supervised_share"]],
        "tokens of an update": ["Multiline", [r"data/tokens"]],
    },
}

HYPER_PARAMETERS = (
    "preset model dataset chat_template supervise max_length epochs max_steps batch_size lr warmup_steps weight_decay "
    "max_grad_norm seed"
).split()


def curves_of(kind, numbers):
    """The curves that a line of `metrics.jsonl` belongs to: pairs of a tag and a value."""
    found = {f"{kind}/{name}": value for name, value in numbers.items()}
    if kind == "train" and "seconds" in numbers:
        waiting, optimizer = numbers["seconds_data"], numbers.get("seconds_optimizer", 0.0)
        found["data/supervised_share"] = numbers["supervised_tokens"] / numbers["tokens"]
        found["data/tokens"] = numbers["tokens"]
        found |= {"time/waiting": waiting, "time/optimizer": optimizer}
        found["time/forward_backward"] = numbers["seconds"] - waiting - optimizer
        found["memory/peak_gb"] = numbers["peak_memory"] / 1e9
    if kind == "eval" and "seconds" in numbers:
        found["time/evaluation"] = numbers["seconds"]
    return {tag: value for tag, value in found.items() if tag in CURVES}


def scalar(tag, value):
    """A point of a curve, with the curve's description."""
    point = summary.scalar(tag, value)
    point.value[0].metadata.plugin_data.plugin_name = "scalars"
    point.value[0].metadata.summary_description = CURVES[tag if tag in CURVES else tag.split("/")[0]]
    return point


def hyper_parameters(config, precision, results):
    """The row of a run in TensorBoard's table of hyper-parameters: its summaries.

    Args:
        results: the final numbers, by name.
    """
    settings = {name: as_text(getattr(config, name)) for name in HYPER_PARAMETERS} | {"precision": precision}
    final = {f"final/{name}": value for name, value in results.items()}
    return [*summary.hparams(settings, final), *(summary.scalar(tag, value) for tag, value in final.items())]


def settings_table(config):
    """The settings of a run as a Markdown table; what differs from the default is bold."""
    rows = ["| setting | value | default |", "|---|---|---|"]
    for setting in dataclasses.fields(Config):
        value, default = as_text(getattr(config, setting.name)), as_text(setting.default)
        shown = escaped(value) if value == default else f"**{escaped(value)}**"
        rows.append(f"| {setting.name} | {shown} | {escaped(default)} |")
    return "\n".join(rows)


def masked_table(example, tokenizer):
    """A conversation as a Markdown table: context on the left, what is supervised on the right."""
    rows, begin = ["| context | supervised |", "|---|---|"], 0
    for is_supervised, group in itertools.groupby(example.supervised.tolist()):
        end = begin + len(list(group))
        text = escaped(tokenizer.decode(example.input_ids[begin:end]))
        rows.append(f"| | {text} |" if is_supervised else f"| {text} | |")
        begin = end
    return "\n".join(rows)


def answer_text(answer):
    """An answer as Markdown."""
    ending = "" if answer.finished else " …"
    return f"*{'greedy' if answer.greedy else 'sampled'}, {answer.tokens} tokens:*\n\n> {quoted(answer.text)}{ending}"


def quoted(text):
    """A text as the inside of a Markdown quotation."""
    return "<br>".join(map(escaped, text.splitlines()))


def escaped(text):
    """Anything as Markdown that shows it as it is, in a table's cell too."""
    text = str(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", text).replace("\n", "<br>")
