"""Growth of an update's time and memory with a conversation's length, the number of conversations, the vocabulary.

    python -m benchmarks.growth

Each measurement has a process of its own. Writes benchmarks/results/growth-<hardware>.json and docs/growth.png, and
prints the tables. The model has SmolLM2's shape and random weights: their values change neither time nor memory.
"""

import json
import os
import resource
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.compare import ROOT, describe_hardware, peak_memory
from benchmarks.roofline import SMOLLM2
from compute.cross_entropy import linear_cross_entropy
from compute.layout import random_examples
from compute.memory import keep_freed_memory
from compute.self_check import choose_layout
from config import Config, Parser, run_command
from model import choose_precision, token_loss
from storage import hub
from train import make_optimizer, train_step

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
COUNTS = (4, 16, 32)  # of conversations of 256 tokens, in one window
VOCABULARIES = (49_152, 256_000)
SUPERVISED = (512, 2048, 8192)  # tokens, for the output head alone


def measure_update(length, count):
    """The seconds of the second of two updates over `count` conversations of `length` tokens, and the peak memory."""
    torch.manual_seed(0)
    precision = choose_precision()
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(precision.device)
    layout = choose_layout(model, token_loss, Config(), 0, precision)
    optimizer, scaler = make_optimizer(model, 0.1), precision.grad_scaler()
    for lengths in ([64], [length] * count):
        began = time.perf_counter()
        window = list(layout.micro_batches(random_examples(lengths, 49_152)))
        train_step(model, optimizer, window, 1e-4, precision=precision, scaler=scaler, max_grad_norm=1.0)
    return {"seconds": time.perf_counter() - began, "peak_memory_gb": peak_memory(precision)}


def measure_head(vocabulary, tokens, full_logits):
    """The seconds of an output head's loss and gradient, and the memory beyond hidden states and weights.

    Args:
        full_logits: whether to use torch's linear and cross_entropy, which hold all logits.
    """
    torch.manual_seed(0)
    precision = choose_precision()
    head = nn.Linear(576, vocabulary, bias=False, device=precision.device)
    hidden = torch.randn(tokens, 576, device=precision.device).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=precision.device)
    held, began = peak_memory(precision), time.perf_counter()
    with precision.autocast():
        if full_logits:
            loss = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
        else:
            loss = linear_cross_entropy(hidden, head, targets)
    loss.backward()
    loss.item()
    return {"seconds": time.perf_counter() - began, "peak_memory_gb": peak_memory(precision) - held}


def measure_in_subprocess(kind, *arguments):
    """One measurement, in a process of its own; None where it runs out of memory."""
    command = [sys.executable, "-m", "benchmarks.growth", "--measure", json.dumps([kind, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    print(kind, *arguments, result, file=sys.stderr, flush=True)
    return result


def describe_head(full_logits):
    return "all logits" if full_logits else "in chunks"


def table_row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def format_result(result):
    return f"{result['seconds']:.1f} s, {result['peak_memory_gb']:.2f} GB" if result else "does not fit"


def draw(lengths, heads, path):
    """Two plots: seconds and memory by length, memory of the head by the number of supervised tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    tokens = list(lengths)
    left.plot(tokens, [1000 * lengths[n]["seconds"] / n for n in tokens], "o-", label="ms a token")
    left.plot(tokens, [lengths[n]["peak_memory_gb"] for n in tokens], "s-", label="peak memory, GB")
    left.set(xscale="log", xlabel="tokens in one conversation", title="An update over one conversation", ylim=0)
    for (vocabulary, full_logits), results in heads.items():
        points = [(n, result["peak_memory_gb"]) for n, result in results.items() if result]
        label = f"V = {vocabulary:,}, {describe_head(full_logits)}"
        right.plot(*zip(*points, strict=True), "x--" if full_logits else "o-", label=label)
    right.set(xscale="log", xlabel="supervised tokens", ylabel="GB", title="Memory of the output head", ylim=0)
    for axes, ticks in ((left, tokens), (right, SUPERVISED)):
        axes.minorticks_off()
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(argv):
    parser = Parser(description="Growth of time and memory with length, number of conversations and vocabulary.")
    parser.add_argument("--measure", type=json.loads, help="one thing only, in this process")
    options = parser.parse_args(argv)
    hub.quiet_libraries()
    if options.measure:
        kind, *arguments = options.measure
        if choose_precision().device.type == "cpu":  # an error, before the kernel kills somebody
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (int(0.9 * memory),) * 2)
            keep_freed_memory()
        print(json.dumps({"update": measure_update, "head": measure_head}[kind](*arguments)))
        return 0
    lengths = {n: measure_in_subprocess("update", n, 1) for n in LENGTHS}
    counts = {n: measure_in_subprocess("update", 256, n) for n in COUNTS}
    heads = {
        (vocabulary, full_logits): {
            tokens: measure_in_subprocess("head", vocabulary, tokens, full_logits) for tokens in SUPERVISED
        }
        for vocabulary in VOCABULARIES
        for full_logits in (False, True)
    }
    name, file_name = describe_hardware(choose_precision())
    record = {
        "hardware": name,
        "torch": torch.__version__,
        "one conversation of length": lengths,
        "conversations of 256 tokens": counts,
        "output head": {
            f"{vocabulary}, {describe_head(full)}": results for (vocabulary, full), results in heads.items()
        },
    }
    (ROOT / "benchmarks" / "results" / f"growth-{file_name}.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(lengths, heads, ROOT / "docs" / "growth.png")
    print(f"{name}\n\n| one conversation of | an update |\n|---|---|")
    print("\n".join(table_row(f"{n:,} tokens", format_result(result)) for n, result in lengths.items()))
    print("\n| conversations of 256 tokens | an update |\n|---|---|")
    print("\n".join(table_row(n, format_result(result)) for n, result in counts.items()))
    print(f"\n{table_row('output head', *(f'{n:,} tokens' for n in SUPERVISED))}\n|---|{'---|' * len(SUPERVISED)}")
    for (vocabulary, full_logits), results in heads.items():
        cells = [format_result(results[n]) for n in SUPERVISED]
        print(table_row(f"vocabulary {vocabulary:,}, {describe_head(full_logits)}", *cells))
    return 0


if __name__ == "__main__":
    run_command(main)
