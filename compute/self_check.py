"""The self-check before training: which ways of computing a model's loss are exact for it.

Packed conversations, and the output head applied to supervised tokens alone, are right for most models. They are wrong
for one whose attention has a sliding window or a cap, or that scales its logits, and the next model will have something
else. So nothing is assumed: a small batch goes through the model's own forward pass, padded, and through ours.
"""

from dataclasses import replace

import torch

from compute.attention import PACKED, in_the_graph
from compute.layers import compile_layers, in_eval_mode
from compute.layout import Layout, random_examples
from compute.memory import compiling_pays, fitting_tokens
from compute.processes import largest
from compute.sharding import is_sharded, whole
from config import UserError, first_line

LENGTHS = (24, 9, 16)  # of the small batch's conversations
# Relative, of loss and gradient: 16 bits round. Where conversations see each other, the difference is a third or more.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}


class Mismatch(Exception):
    """A layout is not exact for a model: it gives another loss or gradient, or the model says that it would."""


def choose_layout(model, token_loss, config, pad_id, precision, longest=1024, total_tokens=0, budget=0, training=True):
    """The `Layout` for a model: packed, and with the head only where it counts, where these are exact.

    The model's attention is set to it. With `--compile`, or by default in a long run on a GPU, its layers are compiled,
    and checked like the rest.

    Args:
        token_loss: `model.token_loss`, whose result is checked.
        longest: tokens of the longest conversation there will be.
        total_tokens: of the whole run.
        budget: tokens of a micro-batch, where neither `--micro-batch-tokens` says it nor memory is to.
        training: whether gradients will be computed, and need memory.

    Raises:
        UserError: the layout that was asked for is not exact for this model, or it cannot be compiled.
    """
    attention = model.config._attn_implementation
    own = Layout(False, 2**20, pad_id, own_logits=True, pinned=precision.device.type == "cuda")
    padded = replace(own, own_logits=False)
    packed = replace(padded, packed=True)
    refuse_non_causal(model, config, precision)
    expected = loss_and_gradient(model, token_loss, own, precision)
    layout, why = own, None
    for faster in (padded,) if config.layout == "padded" else (padded, packed):
        try:
            refuse_other_attention(model, faster)
            use_layout(model, faster)
            compare(model, token_loss, faster, precision, expected)
        except Mismatch as error:
            why = error
            break
        layout = faster
    if why and config.layout == "packed":
        raise UserError(f"--layout packed: not exact for {config.model}, {why}; use --layout padded") from why
    if why:
        model.set_attn_implementation(attention)
        layout = replace(layout, why=str(why))
    compile = config.compile
    if compile is None:
        combines = in_the_graph(precision.device) or not layout.packed
        pays = combines and compiling_pays(model, token_loss, layout, precision, longest, total_tokens)
        compile = bool(largest(int(pays)))  # all processes or none
    if compile:
        layout = replace(layout, compiled=True)
        compile_and_check(model, token_loss, layout, precision, expected, config)
    tokens = config.micro_batch_tokens or budget
    tokens = tokens or fitting_tokens(model, token_loss, layout, precision, longest, training)
    return replace(layout, tokens=tokens)


def compile_and_check(model, token_loss, layout, precision, expected, config):
    """Compile a model's layers; raise `UserError` where that cannot be done, or changes the loss or gradient."""
    if config.gradient_checkpointing and layout.packed and not in_the_graph(precision.device):
        raise UserError(
            "--compile and --gradient-checkpointing: packed attention is not compiled on this device, and inside of "
            "recomputed layers that leaves nothing compiled; leave one of them out, or use --layout padded"
        )
    compile_layers(model)
    try:
        compare(model, token_loss, layout, precision, expected)
    except Mismatch as why:
        raise UserError(f"--compile: {why}; leave it out") from why
    except Exception as error:  # a missing compiler, say
        raise UserError(f"--compile: {type(error).__name__}: {first_line(error)}; leave it out") from error


@torch.no_grad()
def refuse_non_causal(model, config, precision):
    """Raise `UserError` where the first tokens' logits depend on later tokens: a model like BERT reads both ways.

    In an untrained one they do so by less than 16 bits round, so this is in fp32, but for layers that processes share.
    """
    precision = precision if is_sharded(model) else replace(precision, name="fp32")
    ids = random_examples([8], model.get_input_embeddings().num_embeddings)[0].input_ids.to(precision.device)
    changed = torch.cat([ids[:4], (ids[4:] + 1) % model.get_input_embeddings().num_embeddings])
    with in_eval_mode(model), precision.autocast():
        first, second = model(input_ids=torch.stack([ids, changed]), use_cache=False).logits[:, :4].float()
    difference = ((first - second).norm() / first.norm()).item()
    if difference > TOLERANCES[precision.name]:
        what = "not a causal language model, as earlier tokens' logits depend on later tokens"
        raise UserError(f"--model {config.model}: {what}")


def use_layout(model, layout):
    """Set the attention of a model, as it was loaded, to what a layout needs."""
    if layout.packed:
        model.set_attn_implementation(PACKED)


def loss_and_gradient(model, token_loss, layout, precision):
    """The loss of the small batch in a layout, and the gradient of one matrix: the last that is no embedding.

    In 16 bits, and on random tokens, the first layers' gradients are mostly rounding; the last one's is not.
    """
    embeddings = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    matrix = [p for p in model.parameters() if p.ndim == 2 and not any(p is other for other in embeddings)][-1]
    examples = random_examples(LENGTHS, len(embeddings[0]))
    with in_eval_mode(model):
        loss = 0.0
        for batch in replace(layout, tokens=2**20).batches(examples):
            with precision.autocast():
                loss = loss + token_loss(model, batch.to(precision.device))
        loss.backward()
        gradient = whole(matrix.grad)
        model.zero_grad()
        return loss.detach(), gradient


def refuse_other_attention(model, layout):
    """Raise `Mismatch` where a model's attention is not transformers' replaceable one, or not in every layer."""
    if not layout.packed:
        return
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        raise Mismatch("its attention cannot be replaced")
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:  # a window may be wider than the small batch is long
        raise Mismatch(f"it has layers of {', '.join(sorted(layers - {'full_attention'}))}")


def compare(model, token_loss, layout, precision, expected):
    """Raise `Mismatch` unless a layout gives the expected loss and gradient; any other failure is an error."""
    try:
        found = loss_and_gradient(model, token_loss, layout, precision)
    except NotImplementedError as error:  # `packed_attention`, of what a model asks of it
        raise Mismatch(first_line(error)) from error
    if found[1] is None:  # of a matrix between the last layer and the output head
        raise Mismatch("its output head is more than a matrix")
    for name, ours, own in zip(("loss", "gradient"), found, expected, strict=True):
        off = ((ours - own).norm() / own.norm()).item()
        if not off <= TOLERANCES[precision.name]:
            raise Mismatch(f"a {name} is off by {off:.1%}")
