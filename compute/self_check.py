"""Before training: which ways of computing a model's loss are exact for it, and how much of it fits into memory.

Packed conversations, and the output head applied to supervised tokens alone, are right for most models. They are wrong
for one whose attention has a sliding window or a cap, or that scales its logits, and the next model will have something
else. So nothing is assumed: a small batch goes through the model's own forward pass, padded, and through ours.
"""

from dataclasses import replace

import torch

from attention import PACKED
from chat import Example
from config import UserError, first_line
from layout import Layout
from model import compile_layers, in_eval_mode, supervised_states, token_loss

LENGTHS = (24, 9, 16)  # of the small batch's conversations
# How far loss and gradient may be off, relative: 16 bits round. Where conversations see each other, a third and more.
BARS = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}
CPU_TOKENS = 1536  # of a micro-batch; a CPU is no faster with more, and in SmolLM2 they cost 1 MB each
GPU_TOKENS = 2**16  # at most
GPU_SHARE = 0.7  # of what is free; the rest is for the loss, and for what an allocator cannot use


class Differs(Exception):
    """Something gives another loss or gradient than the model's own."""


def choose_layout(model, config, pad_id, precision):
    """The `Layout` for a model: packed, and with the head only where it counts, where these are exact.

    The model's attention is set to it. With `--compile` its layers are compiled, and checked like the rest.

    Raises:
        UserError: the layout that was asked for is not exact for this model, or it cannot be compiled.
    """
    attention = model.config._attn_implementation
    own = Layout(False, 2**20, pad_id, own_logits=True, pinned=precision.device.type == "cuda")
    padded = replace(own, own_logits=False)
    packed = replace(padded, packed=True)
    expected = loss_and_gradient(model, own, precision)
    layout, why = own, None
    for faster in (padded,) if config.layout == "padded" else (padded, packed):
        use_layout(model, faster)
        try:
            compare(model, faster, precision, expected)
        except Differs as error:
            why = error
            break
        layout = faster
    if why and config.layout == "packed":
        raise UserError(f"--layout packed: not exact for {config.model}, {why}; use --layout padded") from why
    if why:
        model.set_attn_implementation(attention)
        layout = replace(layout, why=str(why))
    layout = replace(layout, tokens=config.micro_batch_tokens or fitting_tokens(model, layout, precision))
    if config.compile:
        compile_layers(model)
        try:
            compare(model, layout, precision, expected)
        except Differs as why:
            raise UserError(f"--compile: {why}; leave it out") from why
    return layout


def use_layout(model, layout):
    """Set the attention of a model, as it was loaded, to what a layout needs."""
    if layout.packed:
        model.set_attn_implementation(PACKED)


def loss_and_gradient(model, layout, precision):
    """The loss of the small batch in a layout, and the gradient of one matrix: the last that is no embedding.

    In 16 bits, and on random tokens, the first layers' gradients are mostly rounding; the last one's is not.
    """
    embeddings = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    matrix = [p for p in model.parameters() if p.ndim == 2 and not any(p is other for other in embeddings)][-1]
    examples = made_up(LENGTHS, len(embeddings[0]))
    with in_eval_mode(model):
        loss = 0.0
        for batch in replace(layout, tokens=2**20).batches(examples):
            with precision.autocast():
                loss = loss + token_loss(model, batch.to(precision.device))
        return loss.detach(), torch.autograd.grad(loss, [matrix])[0]


def made_up(lengths, vocabulary):
    """Examples of random tokens, all of them supervised; always the same."""
    ids = torch.randint(vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return [Example(part, part) for part in ids.split(lengths)]


def compare(model, layout, precision, expected):
    """Raise `Differs` unless a layout gives the expected loss and gradient."""
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if layout.packed and layers != {"full_attention"}:  # a window may be wider than the small batch is long
        raise Differs(f"it has layers of {', '.join(sorted(layers - {'full_attention'}))}")
    try:
        found = loss_and_gradient(model, layout, precision)
    except Exception as error:  # whatever a model's code says to arguments it does not know
        raise Differs(first_line(error)) from error
    for name, ours, own in zip(("loss", "gradient"), found, expected, strict=True):
        off = ((ours - own).norm() / own.norm()).item()
        if not off <= BARS[precision.name]:
            raise Differs(f"a {name} is off by {off:.1%}")


def fitting_tokens(model, layout, precision):
    """How many tokens a micro-batch may have on this device.

    On a GPU, a share of the memory that is left when gradients, AdamW's two moments and 16-bit weights have theirs, by
    what the activations of a token take: two forward passes of different lengths measure that.
    """
    device = precision.device
    if device.type == "cpu":
        return CPU_TOKENS
    held = []
    for tokens in (512, 2048):
        (batch,) = layout.batches(made_up([512] * (tokens // 512), model.get_input_embeddings().num_embeddings))
        before = torch.cuda.memory_allocated(device)
        with precision.autocast():
            states = supervised_states(model, batch.to(device))
        held.append(torch.cuda.memory_allocated(device) - before)
        del states
    a_token = (held[1] - held[0]) / (2048 - 512)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    free -= (3 * 4 + 2) * sum(p.numel() for p in model.parameters())
    return max(1024, min(GPU_TOKENS, int(GPU_SHARE * free / a_token) // 1024 * 1024))
