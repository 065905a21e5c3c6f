"""A prediction of a GPU's speed, without a GPU, from the bytes that an update moves, its FLOPs and its kernels.

    python -m benchmarks.roofline [--model llama-3.2-1b --tokens 16384]

An update of a model is run on fake tensors, which have shapes and no values. A kernel takes the longest of its
bytes at the memory's bandwidth, its FLOPs at the speed of matrix products, and, where nothing is compiled, its launch
by the CPU. Compiled, what lies between two products is one kernel that reads its inputs and writes its outputs.
"""

import json
from contextlib import ExitStack
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

from compute import attention, cross_entropy
from compute.layout import Layout
from compute.self_check import use_layout
from config import Parser, run_command
from conversations.masking import IGNORE, Example
from model import Precision, token_loss

aten = torch.ops.aten
# The makers' figures for dense bf16 or fp16: bytes and FLOPs per second. The fraction reached is assumed, below.
DEVICES = {
    "H100 SXM": (3.35e12, 989e12),
    "H200 SXM": (4.8e12, 989e12),
    "A100 SXM 80 GB": (2.04e12, 312e12),
    "L4": (0.30e12, 121e12),
    "T4 (fp16)": (0.32e12, 65e12),
}
BANDWIDTH_FRACTION, FLOPS_FRACTION = 0.8, 0.6  # of the makers' figures
LAUNCH = 7e-6  # CPU seconds per eager operation, autograd included
VIEWS = (aten._unsafe_view, aten.detach, aten.alias, aten.lift_fresh)
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
SHAPES = {"smollm2-135m": SMOLLM2, "llama-3.2-1b": LLAMA_1B}


class Kernels(TorchDispatchMode):
    """Records the operations that run: (FLOPs, [(storage, bytes) read], [(storage, bytes) written])."""

    def __init__(self):
        super().__init__()
        self.found, self.kept = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        read, written = (find_tensors(each) for each in ((args, kwargs), output))
        self.kept += [tensor.untyped_storage() for tensor in read + written]  # so that no storage id is reused
        moves = not function.is_view and function.overloadpacket not in VIEWS and written
        if moves and not str(function).startswith(("aten.empty", "prim")):
            count = flop_registry.get(function.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=output) if count else 0
            flops *= 0.5 if "varlen" in str(function) else 1  # torch counts the masked half, too
            self.found.append((flops, *([(storage_id(t), t.nbytes) for t in each] for each in (read, written))))
        return output


def find_tensors(tree):
    return [each for each in _pytree.tree_leaves(tree) if isinstance(each, torch.Tensor)]


def storage_id(tensor):
    return tensor.untyped_storage()._cdata


def fuse_kernels(kernels):
    """Fuse the kernels between two operations with FLOPs; a fused kernel moves only its inputs and outputs."""
    groups, group = [], []
    for kernel in kernels:
        if kernel[0]:
            groups += [group, [kernel]] if group else [[kernel]]
            group = []
        else:
            group.append(kernel)
    groups += [group] if group else []
    last_read = {}
    for number, group in enumerate(groups):
        for _, read, _ in group:
            last_read |= {storage: number for storage, _ in read}
    for number, group in enumerate(groups):
        read, written = {}, {}
        for _, reads, writes in group:
            read |= {storage: size for storage, size in reads if storage not in written}
            written |= dict(writes)
        kept = {storage: size for storage, size in written.items() if last_read.get(storage, 0) > number}
        yield sum(kernel[0] for kernel in group), list(read.items()), list(kept.items())


def sum_seconds(kernels, bandwidth, flops, launch):
    """The seconds that kernels take, one after the other."""
    total = 0.0
    for count, read, written in kernels:
        moved = sum(size for _, size in read + written)
        total += max(moved / (BANDWIDTH_FRACTION * bandwidth), count / (FLOPS_FRACTION * flops), launch)
    return total


def trace_update(shape, tokens, length, supervised):
    """The kernels of a forward and backward pass, without AdamW, over conversations of one length; and the weights."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(attention, "has_varlen_kernel", return_value=True))
        stack.enter_context(mock.patch.object(cross_entropy, "chunk_rows", return_value=cross_entropy.GPU_ROWS))
        stack.enter_context(mock.patch.object(cross_entropy, "BLOCK", 2**60))  # a GPU takes a chunk at once
        labels = torch.arange(length).where(torch.arange(length) < supervised * length, IGNORE)
        examples = [Example(torch.zeros(length, dtype=torch.long), labels)] * (tokens // length)
        layout = Layout(True, tokens, 0)
        (batch,) = layout.micro_batches(examples)
        with FakeTensorMode(allow_non_fake_inputs=False) as fake:
            model = LlamaForCausalLM(LlamaConfig(**shape))
            use_layout(model, layout)
            batch = batch.map(fake.from_tensor)
            with Kernels() as kernels, Precision("bf16", torch.device("cpu")).autocast():
                loss = token_loss(model, batch)
            with kernels:
                loss.backward()
    return kernels.found, sum(p.numel() for p in model.parameters())


def predict(kernels, parameters, tokens, bandwidth, flops):
    """Tokens a second, eager and compiled; AdamW reads 16 bytes a parameter and writes 12, clipping moves 12."""
    optimizer = 40 * parameters / (BANDWIDTH_FRACTION * bandwidth)
    eager = sum_seconds(kernels, bandwidth, flops, LAUNCH)
    compiled = sum_seconds(fuse_kernels(kernels), bandwidth, flops, 0.0)
    return {"eager": tokens / (eager + optimizer), "compiled": tokens / (compiled + optimizer)}


def main(argv):
    parser = Parser(description="Predict a model's speed on GPUs from bytes, FLOPs and launches.")
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m", help="its shape (default smollm2-135m)")
    parser.add_argument("--tokens", type=int, default=65_536, help="of an update, one micro-batch (default 65,536)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a conversation (default 1,024)")
    parser.add_argument("--supervised", type=float, default=0.6, help="share of the tokens (default 0.6)")
    parser.add_argument("--bandwidth", type=float, help="of another device, in bytes a second")
    parser.add_argument("--flops", type=float, help="of another device, in 16-bit FLOPs a second")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(argv)
    devices = {"this device": (options.bandwidth, options.flops)} if options.bandwidth and options.flops else DEVICES
    kernels, parameters = trace_update(SHAPES[options.model], options.tokens, options.length, options.supervised)
    found = {name: predict(kernels, parameters, options.tokens, *of) for name, of in devices.items()}
    if options.json:
        print(json.dumps({"kernels": len(kernels), "tokens_per_second": found}))
        return 0
    for name, those in (("eager", kernels), ("compiled", list(fuse_kernels(kernels)))):
        moved = sum(size for _, read, written in those for _, size in read + written)
        flops = sum(count for count, _, _ in those)
        print(f"{name}: {len(those):,} kernels, {moved / 1e9:,.0f} GB moved, {flops / 1e12:.1f} TFLOP")
    print()
    print("| predicted tokens/s | eager | compiled | share of peak, compiled |\n|---|---|---|---|")
    for name, speeds in found.items():
        share = flops / options.tokens * speeds["compiled"] / devices[name][1]
        print(f"| {name} | {speeds['eager']:,.0f} | {speeds['compiled']:,.0f} | {share:.0%} |")
    return 0


if __name__ == "__main__":
    run_command(main)
