"""The eval loss of one model on one split for several batch sizes, by `transformers.Trainer` and by this program.

    python -m benchmarks.eval_loss

And how fast, in tokens of the split a second; at the end greedy answers, many at a time and one by one.
"""

import itertools
import tempfile
import time

from datasets import Dataset
from transformers import Trainer, TrainingArguments

from compute.layout import Layout
from compute.self_check import use_layout
from config import Parser, resolve, run_command
from conversations.masking import encode_prompt
from conversations.tokenizer import load_tokenizer
from data import load_data
from eval import evaluate
from evaluation.generation import generate_batches, make_messages
from model import choose_precision, load_model
from storage import hub
from tests import reference

PROMPTS = ("What is the capital of France?", "Name three colors.", "Write a haiku.", "Why is the sky blue?")


def evaluate_by_trainer(model, rows, pad_id, batch_size, precision):
    """The loss as `Trainer` has it."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            per_device_eval_batch_size=batch_size,
            use_cpu=True,
            bf16=precision.name == "bf16",
            report_to="none",
            disable_tqdm=True,
            prediction_loss_only=True,
        )
        trainer = Trainer(model, arguments, data_collator=reference.collator(pad_id), eval_dataset=rows)
        trainer.log = lambda *_: None
        return trainer.evaluate()["eval_loss"]


def measure(function, *arguments):
    """The result of a function, and the seconds that it took."""
    began = time.perf_counter()
    return function(*arguments), time.perf_counter() - began


def answer(model, tokenizer, budget):
    """Greedy answers of up to 32 tokens to 32 prompts, as `generate_batches` yields them."""
    prompts = [encode_prompt(make_messages(text), tokenizer) for text in PROMPTS for _ in range(8)]
    return list(generate_batches(model, tokenizer, prompts, [32] * len(prompts), budget=budget))


def main(argv):
    parser = Parser(description="Compare the eval loss with Trainer's, and measure the speed of evaluating.")
    parser.add_argument("--dtype", default="fp32", help="default fp32")
    precision = choose_precision("cpu", parser.parse_args(argv).dtype)
    hub.quiet_libraries()
    config = resolve({}, "quickstart")
    path, local = hub.find_model(config.model)
    tokenizer = load_tokenizer(path, local)
    model, pad_id = load_model(path, tokenizer, precision.device, local), tokenizer.pad_token_id
    examples = load_data(config, tokenizer).eval.examples
    tokens = sum(len(ids) for ids, _ in examples)
    rows = Dataset.from_list([{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in examples])
    print(f"{config.model}, the {len(examples)} eval conversations of the quickstart, {precision.name}")
    for batch_size in (1, 4, 8, len(examples)):
        loss, seconds = measure(evaluate_by_trainer, model, rows, pad_id, batch_size, precision)
        print(f"  Trainer, batches of {batch_size:>2}: {loss:.6f}, {tokens / seconds:,.0f} tokens/s", flush=True)
    for packed, budget in itertools.product((False, True), (1, 512, 4096)):
        layout, name = Layout(packed, budget, pad_id), "packed" if packed else "padded"
        use_layout(model, layout)
        evaluation, seconds = measure(evaluate, model, examples, layout, precision)
        speed = f"{tokens / seconds:,.0f} tokens/s"
        print(f"  ours, {name}, up to {budget:>4} tokens: {evaluation.loss:.6f}, {speed}", flush=True)
    for budget in (1, 4096):
        batches, seconds = measure(answer, model, tokenizer, budget)
        counts = [count for batch in batches for *_, count in batch]
        speed = f"{sum(counts) / seconds:,.0f} tokens/s"
        print(f"  {len(counts)} answers, {len(batches)} batches: {speed}", flush=True)


if __name__ == "__main__":
    run_command(main)
