"""Speed of packed conversations, and of padded rows, in models with sliding windows.

    python -m benchmarks.windows

Two models of six layers with random weights (Mistral's kind, with and without windows; Gemma 3's, in which every sixth
layer has none) compute the gradient of eight conversations in each layout, in turns.
"""

import benchmarks.bare  # noqa: F401  first: it mocks what is not installed

# isort: split
import statistics
import time

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from compute.layout import Layout, random_examples
from compute.memory import CPU_TOKENS, keep_freed_memory
from compute.self_check import use_layout
from config import Parser, run_command
from model import Precision, token_loss

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
LENGTHS = (1024, 900, 700, 512, 300, 150, 80, 40)  # tokens of the conversations
LAYOUTS = {
    "padded, with a mask": Layout(packed=False, tokens=CPU_TOKENS, pad_id=0),
    "padded": Layout(packed=False, tokens=CPU_TOKENS, pad_id=0, masked=False),
    "packed": Layout(packed=True, tokens=CPU_TOKENS, pad_id=0),
}


def measure(model, precision, rounds):
    """Median tokens per second in each layout, after a round that is not measured."""
    examples, speeds = random_examples(LENGTHS, SHAPE["vocab_size"]), {}
    for number in range(rounds + 1):
        for name, layout in LAYOUTS.items():
            model.set_attn_implementation("sdpa")
            use_layout(model, layout)
            began = time.perf_counter()
            for batch in layout.micro_batches(examples):
                with precision.autocast():
                    loss = token_loss(model, batch)
                loss.backward()
            model.zero_grad()
            if number:
                speeds.setdefault(name, []).append(sum(LENGTHS) / (time.perf_counter() - began))
    return {name: statistics.median(each) for name, each in speeds.items()}


def main(argv):
    parser = Parser(description="Compare layouts in models with sliding windows, on a CPU.")
    parser.add_argument("--window", type=int, default=256, help="tokens that a token attends to (default 256)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    keep_freed_memory()
    torch.manual_seed(0)
    window = {"sliding_window": options.window}
    models = {
        "Mistral, windows": MistralForCausalLM(MistralConfig(**SHAPE, **window)),
        "Mistral, no windows": MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
        "Gemma 3, windows": Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **window)),
    }
    print(f"| tokens/s | {' | '.join(LAYOUTS)} |\n|---|{'---|' * len(LAYOUTS)}")
    for name, model in models.items():
        for dtype in ("bf16", "fp32"):
            speeds = measure(model.train(), Precision(dtype, torch.device("cpu")), options.rounds)
            print(f"| {name}, {dtype} | {' | '.join(f'{speed:,.0f}' for speed in speeds.values())} |", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
