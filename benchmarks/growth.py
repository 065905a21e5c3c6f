"""How time and memory of an update grow: with a conversation's length, the number of conversations, the vocabulary.

    python -m benchmarks.growth

Each measurement has a process of its own. Writes benchmarks/results/growth-<hardware>.json and docs/growth.png, and
prints the tables. SmolLM2's shape with random weights: neither time nor memory hangs on their values.
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

from benchmarks.compare import ROOT, hardware, peak_memory
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


def update(length, count):
    """The second of two updates over `count` conversations of `length` tokens: its seconds, and the peak memory."""
    torch.manual_seed(0)
    precision = choose_precision()
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(precision.device)
    layout = choose_layout(model, token_loss, Config(), 0, precision)
    optimizer, scaler = make_optimizer(model, 0.1), precision.grad_scaler()
    for lengths in ([64], [length] * count):
        began = time.perf_counter()
        window = list(layout.batches(random_examples(lengths, 49_152)))
        train_step(model, optimizer, window, 1e-4, precision=precision, scaler=scaler, max_grad_norm=1.0)
    return {"seconds": time.perf_counter() - began, "peak_memory_gb": peak_memory(precision)}


def head(vocabulary, tokens, whole):
    """Loss and gradient of an output head: seconds, and the memory they take beyond hidden states and weights.

    Args:
        whole: by torch's linear and cross_entropy, which hold all logits.
    """
    torch.manual_seed(0)
    precision = choose_precision()
    head = nn.Linear(576, vocabulary, bias=False, device=precision.device)
    hidden = torch.randn(tokens, 576, device=precision.device).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=precision.device)
    held, began = peak_memory(precision), time.perf_counter()
    with precision.autocast():
        if whole:
            loss = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
        else:
            loss = linear_cross_entropy(hidden, head, targets)
    loss.backward()
    loss.item()
    return {"seconds": time.perf_counter() - began, "peak_memory_gb": peak_memory(precision) - held}


def measured(kind, *arguments):
    """One measurement, in a process of its own; None where memory does not suffice."""
    command = [sys.executable, "-m", "benchmarks.growth", "--measure", json.dumps([kind, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    print(kind, *arguments, found, file=sys.stderr, flush=True)
    return found


def how(whole):
    return "all logits" if whole else "in chunks"


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def shown(found):
    return f"{found['seconds']:.1f} s, {found['peak_memory_gb']:.2f} GB" if found else "does not fit"


def draw(lengths, heads, path):
    """Two plots: seconds and memory by length, memory of the head by the number of supervised tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    tokens = list(lengths)
    left.plot(tokens, [1000 * lengths[n]["seconds"] / n for n in tokens], "o-", label="ms a token")
    left.plot(tokens, [lengths[n]["peak_memory_gb"] for n in tokens], "s-", label="peak memory, GB")
    left.set(xscale="log", xlabel="tokens in one conversation", title="An update over one conversation", ylim=0)
    for (vocabulary, whole), found in heads.items():
        points = [(n, result["peak_memory_gb"]) for n, result in found.items() if result]
        label = f"V = {vocabulary:,}, {how(whole)}"
        right.plot(*zip(*points, strict=True), "x--" if whole else "o-", label=label)
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
        print(json.dumps({"update": update, "head": head}[kind](*arguments)))
        return 0
    lengths = {n: measured("update", n, 1) for n in LENGTHS}
    counts = {n: measured("update", 256, n) for n in COUNTS}
    heads = {
        (vocabulary, whole): {tokens: measured("head", vocabulary, tokens, whole) for tokens in SUPERVISED}
        for vocabulary in VOCABULARIES
        for whole in (False, True)
    }
    name, file_name = hardware(choose_precision())
    record = {
        "hardware": name,
        "torch": torch.__version__,
        "one conversation of length": lengths,
        "conversations of 256 tokens": counts,
        "output head": {f"{vocabulary}, {how(whole)}": found for (vocabulary, whole), found in heads.items()},
    }
    (ROOT / "benchmarks" / "results" / f"growth-{file_name}.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(lengths, heads, ROOT / "docs" / "growth.png")
    print(f"{name}\n\n| one conversation of | an update |\n|---|---|")
    print("\n".join(row(f"{n:,} tokens", shown(found)) for n, found in lengths.items()))
    print("\n| conversations of 256 tokens | an update |\n|---|---|")
    print("\n".join(row(n, shown(found)) for n, found in counts.items()))
    print(f"\n{row('output head', *(f'{n:,} tokens' for n in SUPERVISED))}\n|---|{'---|' * len(SUPERVISED)}")
    for (vocabulary, whole), found in heads.items():
        print(row(f"vocabulary {vocabulary:,}, {how(whole)}", *(shown(found[n]) for n in SUPERVISED)))
    return 0


if __name__ == "__main__":
    run_command(main)
