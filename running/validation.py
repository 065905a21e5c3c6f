"""What a run's model can do, measured while it trains: its losses on the eval and test splits, its answers."""

import contextlib

from compute.processes import is_first
from compute.sharding import is_sharded
from eval import VIBE_PROMPTS, evaluate, greedy_and_sampled
from evaluation.generation import Sampling, answers
from running.diagnostics import explain_out_of_memory, refuse_non_finite


def evaluate_split(run, split, signals):
    """The `Evaluation` of the run's model over its "eval" or "test" split. All ranks call this.

    Raises:
        UserError: the loss is not finite, or there is too little memory.
        Stopped: a signal came; a resumed run evaluates again.
    """
    examples = getattr(run.data, split).examples
    with explain_out_of_memory(run, lambda: examples):
        evaluation = evaluate(run.model, examples, run.layout, run.precision, signals.check)
    refuse_non_finite(run, split, evaluation.loss)
    return evaluation


def log_test_and_answers(run, when, step, signals):
    """Log the loss over the test split and the answers to the prompts, "before" or "after" training."""
    evaluation = evaluate_split(run, "test", signals) if run.data.test.examples else None
    generated = generate_answers(run, greedy_and_sampled, Sampling(seed=run.config.seed))
    if evaluation:
        run.log.write("test", step, evaluation.report())
        run.log.write_losses("test", when, evaluation)
    run.log.write_answers(when, step, generated)


def generate_answers(run, generate=answers, *settings):
    """Answers of a run's model to the prompts. Ranks that share its weights generate together, else rank 0 alone."""
    sharded = is_sharded(run.model)
    prompts = VIBE_PROMPTS if sharded or is_first() else ()
    with run.precision.autocast() if sharded else contextlib.nullcontext():  # sharded layers stay in bf16 or fp16
        return generate(run.model, run.tokenizer, prompts, *settings)
