"""The evaluations of a run's model: its losses on the eval and test splits, its answers."""

import contextlib
import dataclasses
import itertools
import math

import torch

from compute.distributed import broadcast_from_rank0, is_rank0, is_sharded
from compute.self_check import use_layout
from eval import DEFAULT_PROMPTS, evaluate, generate_greedy_and_sampled
from evaluation.generation import Sampling, generate_answers
from model import load_on_ranks
from running.checkpoint import BEST
from running.diagnostics import explain_failure
from running.report import plan_of_evaluation
from storage.durable import verify


def evaluate_split(run, split, signals):
    """The `Evaluation` of the run's model over its "eval" or "test" split. All ranks call this.

    Raises `Stopped` where a signal arrives; a resumed run evaluates again.
    """
    examples = getattr(run.data, split).examples
    with explain_failure(run, f"after update {run.step}", examples, range(len(examples))):
        evaluation = evaluate(run.model, examples, run.layout, run.precision, signals.check)
        if not math.isfinite(evaluation.loss):
            raise FloatingPointError(f"{split} loss {evaluation.loss}")
    if split != "eval":
        return evaluation
    losses = iter(evaluation.token_losses)  # of each of several evaluation datasets
    counts = run.data.eval_sources.items()
    means = {name: torch.cat(list(itertools.islice(losses, count))).mean().item() for name, count in counts}
    return dataclasses.replace(evaluation, source_losses=means)


def evaluate_untrained(run, signals):
    """Before the first update: log the untrained model's losses and answers."""
    if run.data.eval.examples:
        evaluation = evaluate_split(run, "eval", signals)
        run.log.write("eval", 0, evaluation.report())
        run.log.write_losses("eval", "before", evaluation)
        print(plan_of_evaluation(evaluation))
    log_test_and_answers(run, "before", 0, signals)


def evaluate_best(run, signals):
    """After the last update: log the test loss and the answers of the best model, loaded from disk."""
    run.saver.wait()
    best = run.directory / BEST
    broadcast_from_rank0(verify, best.resolve().parent)
    run.optimizer = run.model = None  # free their memory
    run.model = load_on_ranks(best, run.tokenizer, run.precision, run.config.shard, local_files_only=True)
    use_layout(run.model, run.layout)
    log_test_and_answers(run, "after", run.best_step, signals)


def log_test_and_answers(run, when, step, signals):
    """Log the loss over the test split and the answers to the prompts, "before" or "after" training."""
    evaluation = evaluate_split(run, "test", signals) if run.data.test.examples else None
    generated = answer_prompts(run, generate_greedy_and_sampled, Sampling(seed=run.config.seed))
    if evaluation:
        run.log.write("test", step, evaluation.report())
        run.log.write_losses("test", when, evaluation)
    run.log.write_answers(when, step, generated)


def answer_prompts(run, generate=generate_answers, *settings):
    """Answers of a run's model to the prompts. Ranks that share its weights generate together, else rank 0 alone."""
    sharded = is_sharded(run.model)
    prompts = DEFAULT_PROMPTS if sharded or is_rank0() else ()
    with run.precision.autocast() if sharded else contextlib.nullcontext():  # sharded layers stay in bf16 or fp16
        return generate(run.model, run.tokenizer, prompts, *settings)
