"""The eval loss of one model on one split for several batch sizes, by `transformers.Trainer` and by this program.

python -m benchmarks.eval_loss
"""

import tempfile

from datasets import Dataset
from transformers import Trainer, TrainingArguments

from compute.layout import Layout
from config import resolve, run_command
from conversations.tokenizer import load_tokenizer
from data import load_data
from eval import evaluate
from model import choose_precision, load_model
from storage import hub
from tests import reference


def main(_argv):
    hub.quiet_libraries()
    config = resolve({}, "quickstart")
    path, local = hub.find_model(config.model)
    tokenizer = load_tokenizer(path, local)
    precision = choose_precision("cpu", "fp32")
    model = load_model(path, tokenizer, precision.device, local)
    examples = load_data(config, tokenizer).eval.examples
    rows = Dataset.from_list([{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in examples])
    pad_id = tokenizer.pad_token_id
    print(f"{config.model}, the {len(examples)} eval conversations of the quickstart, fp32")
    for batch_size in (1, 4, 8, len(examples)):
        with tempfile.TemporaryDirectory() as directory:
            arguments = TrainingArguments(
                directory, per_device_eval_batch_size=batch_size, use_cpu=True, report_to="none", disable_tqdm=True
            )
            trainer = Trainer(model, arguments, data_collator=reference.collator(pad_id), eval_dataset=rows)
            trainer.log = lambda *_: None
            print(f"  Trainer, batches of {batch_size:>2}: {trainer.evaluate()['eval_loss']:.6f}", flush=True)
    for token_budget in (1, 512, 4096):
        loss = evaluate(model, examples, Layout(False, token_budget, pad_id), precision).loss
        print(f"  ours, micro-batches of up to {token_budget:>4} tokens: {loss:.6f}", flush=True)


if __name__ == "__main__":
    run_command(main)
