"""This program and `transformers.Trainer` on real weights and conversations: the same numbers, update by update.

    python -m benchmarks.trainer_parity --updates 6

Both read the same weights; `Trainer` runs the reference experiment's masking and collator (tests/reference.py).
"""

import platform
import tempfile
from pathlib import Path

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from config import PRESETS, QUICKSTART_MODEL, Config, Parser, run_command
from conversations.formats import read_conversations
from conversations.masking import encode
from conversations.sources import parse_source
from conversations.tokenizer import load_tokenizer
from model import choose_precision, load_model
from storage import hub
from tests import parity, reference

BATCH, ACCUMULATION = 2, 4


def main(argv):
    parser = Parser(description="Train the same model with Trainer and with this project's loop.")
    parser.add_argument("--model", default=QUICKSTART_MODEL, help="model to train (default %(default)s)")
    parser.add_argument("--dataset", default=PRESETS["quickstart"]["dataset"][0], help="a .jsonl file of conversations")
    parser.add_argument("--updates", type=int, default=6, help="updates to compare (default %(default)s)")
    parser.add_argument("--double", action="store_true", help="compute in fp64 instead of fp32, on the CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    options = parser.parse_args(argv)
    hub.quiet_libraries()
    device = choose_precision(options.device).device
    path, local = hub.find_model(options.model)
    tokenizer = load_tokenizer(path, local)
    chats = [messages for _, _, messages in read_conversations([parse_source(options.dataset)])]
    # Only conversations that the reference masks right, so that nothing but the two loops is compared.
    chats = [messages for messages in chats if not reference.mistakes(messages, tokenizer)]
    chats = chats[: BATCH * ACCUMULATION * options.updates]

    def model():
        loaded = load_model(path, tokenizer, device, local)
        return loaded.double() if options.double else loaded

    if options.double:
        LlamaRMSNorm.forward = exact_norm
    shared = {"learning_rate": 2e-4, "warmup_steps": 2, "max_steps": options.updates}
    with tempfile.TemporaryDirectory() as directory:
        theirs, our = model(), model()
        rows = [reference.encode(chat, tokenizer) for chat in chats]
        sizes = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATION}
        trainers, _ = reference.train(theirs, rows, [], tokenizer.pad_token_id, directory, **shared, **sizes)
        config = Config(
            lr=2e-4,
            warmup_steps=2,
            max_steps=options.updates,
            batch_size=BATCH * ACCUMULATION,
            dtype="fp32",
            micro_batch_tokens=512,
            output_dir=str(Path(directory) / "ours"),
        )
        ours = parity.train(our, encode(chats, tokenizer), tokenizer, config)
    print(
        f"{options.model} in {'fp64' if options.double else 'fp32'} on {device} ({platform.machine()}), "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    report(ours, trainers, our, theirs)


def report(ours, trainers, our_model, trainers_model):
    """Print two runs side by side, and their largest differences."""
    print(f"{'update':>6} {'learning rate':>22} {'loss, ours':>20} {'Trainer':>20} {'norm, ours':>20} {'Trainer':>20}")
    for number, (mine, their) in enumerate(zip(ours, trainers, strict=True), 1):
        norms = f"{mine.grad_norm:>20.15g} {float(their.grad_norm):>20.15g}"
        print(f"{number:>6} {mine.learning_rate:>22} {mine.loss:>20.15g} {their.loss:>20.15g} {norms}")
    infinite = float("inf")
    largest = parity.compare(
        ours, trainers, our_model, trainers_model, loss=infinite, grad_norm=infinite, weights=infinite
    )
    print("largest differences (relative; weights: absolute):")
    print("  " + ", ".join(f"{name} {value:.1e}" for name, value in largest.items()))
    pairs = zip(our_model.parameters(), trainers_model.parameters(), strict=True)
    differences = torch.cat([(ours - theirs).abs().flatten() for ours, theirs in pairs])
    print(f"  of {len(differences):,} weights, {(differences > 1e-6).sum():,} differ by more than 1e-6")


def exact_norm(norm, hidden):
    """Llama's RMSNorm in the precision of its input; its own rounds to fp32 whatever the rest is computed in."""
    return norm.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


if __name__ == "__main__":
    run_command(main)
