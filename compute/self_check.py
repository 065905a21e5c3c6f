"""The self-check before training: which layouts compute a model's loss exactly.

Packed conversations, and the output head applied to supervised tokens alone, are exact for most models. They are wrong
for a model whose attention has a sliding window or a cap, or that scales its logits. Nothing is assumed about a model:
a small batch goes through its own forward pass, padded, and through each faster layout.
"""

from dataclasses import replace

import torch
from torch.nn import functional as F

from compute.attention import PACKED, compiles
from compute.distributed import full_tensor, is_sharded
from compute.layers import compile_layers, in_eval_mode
from compute.layout import Layout, random_examples
from compute.memory import CPU_TOKENS, measure_micro_batch_budget
from config import UserError, first_line

LENGTHS = (24, 9, 16)  # tokens of the small batch's conversations
# Relative, of loss and gradient: 16 bits round. Where conversations see each other, the difference is a third or more.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}


class Mismatch(Exception):
    """A layout is not exact for a model."""


def choose_layout(model, token_loss, config, pad_id, precision, longest=1024, budget=0, training=True):
    """The fastest exact `Layout` for a model; the model's attention is set to it, and with `--compile` compiled.

    Args:
        token_loss: `model.token_loss`, whose result is checked.
        longest: tokens of the longest conversation in the data.
        budget: tokens of a micro-batch where `--micro-batch-tokens` does not set it; 0: what the memory allows.
        training: False for an evaluation, which needs no memory for gradients and is never compiled.

    Raises:
        UserError: no layout is exact, or the requested one is not, or it cannot be compiled.
    """
    check_causal(model, config, precision)
    check_positions(model, config, longest)
    attention = model.config._attn_implementation
    own = Layout(False, 2**20, pad_id, own_logits=True, pinned=precision.device.type == "cuda")
    padded = replace(own, own_logits=False)
    expected = loss_and_gradient(model, token_loss, own, precision)
    layout = own
    try:
        check_head(model, precision)
        compare(model, token_loss, padded, precision, expected)
        layout = padded
        if config.layout != "padded":
            check_attention(model)
            packed = replace(padded, packed=True)
            use_layout(model, packed)
            compare(model, token_loss, packed, precision, expected)
            layout = packed
    except Mismatch as why:
        if config.layout == "packed":
            raise UserError(f"--layout packed: not exact for {config.model}, {why}; use --layout padded") from why
        model.set_attn_implementation(attention)
        layout = replace(layout, why=str(why))
    if config.compile and training:
        layout = replace(layout, compiled=True)
        compile_and_check(model, token_loss, layout, precision, expected, config)
    tokens = config.micro_batch_tokens or budget or (CPU_TOKENS if precision.device.type == "cpu" else 0)
    tokens = tokens or measure_micro_batch_budget(model, token_loss, layout, precision, longest, training)
    return replace(layout, tokens=tokens)


def use_layout(model, layout):
    """Set the attention of a model, as it was loaded, to what a layout needs."""
    if layout.packed:
        model.set_attn_implementation(PACKED)


def compile_and_check(model, token_loss, layout, precision, expected, config):
    """Compile a model's layers; raise `UserError` if that fails, or changes the loss or gradient."""
    if config.gradient_checkpointing and layout.packed and not compiles(precision):
        raise UserError(
            "--compile and --gradient-checkpointing: without the GPU's attention kernel, packed layers that are "
            "recomputed are not compiled; leave one of them out, or use --layout padded"
        )
    compile_layers(model)
    try:
        compare(model, token_loss, layout, precision, expected)
    except Exception as error:  # a `Mismatch`, or a missing compiler
        why = error if isinstance(error, Mismatch) else f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"--compile: {why}; leave it out") from error


@torch.no_grad()
def check_causal(model, config, precision):
    """Raise `UserError` if the first tokens' logits depend on later tokens: a model like BERT reads both ways."""
    if not is_sharded(model):  # sharded layers keep their precision
        precision = replace(precision, name="fp32")  # in an untrained model, 16-bit rounding hides the dependence
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = random_examples([8], vocabulary)[0].input_ids.to(precision.device)
    changed = torch.cat([ids[:4], (ids[4:] + 1) % vocabulary])
    with in_eval_mode(model), precision.autocast():
        first, second = model(input_ids=torch.stack([ids, changed]), use_cache=False).logits[:, :4].float()
    if relative_difference(first, second) > TOLERANCES[precision.name]:
        reason = "not a causal language model, as earlier tokens' logits depend on later tokens"
        raise UserError(f"--model {config.model}: {reason}")


def check_positions(model, config, longest):
    """Raise `UserError` if LongRoPE or dynamic RoPE would choose frequencies by a micro-batch's largest position."""
    text_config = model.config.get_text_config()
    parameters = getattr(text_config, "rope_parameters", None) or {}
    for rope in (parameters, *(each for each in parameters.values() if isinstance(each, dict))):  # or by kind of layer
        if rope.get("rope_type") not in ("longrope", "dynamic"):
            continue
        limit = rope.get("original_max_position_embeddings") or text_config.max_position_embeddings
        if longest > limit:
            raise UserError(
                f"--model {config.model}: beyond {limit:,} tokens its {rope['rope_type']} positions depend on the "
                f"other conversations of a micro-batch; use --max-length {limit}"
            )


@torch.no_grad()
def check_head(model, precision):
    """Raise `Mismatch` unless the logits are the last hidden states times the output head's matrix, plus its bias.

    A head may also scale its logits, or cap them at c · tanh(x / c), which is x while they are small. So random hidden
    states, with small and with large logits, take the place of the model's own.
    """
    ids = random_examples([8], model.get_input_embeddings().num_embeddings)[0].input_ids[None].to(precision.device)
    head = model.get_output_embeddings()
    weight, bias = full_tensor(head.weight), None if head.bias is None else full_tensor(head.bias)
    random = torch.randn(1, 8, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)

    def use_random_states(_module, _inputs, output):
        output.last_hidden_state = hidden
        return output

    hook = model.base_model.register_forward_hook(use_random_states)
    with hook, in_eval_mode(model), precision.autocast():
        for largest_logit in (1.0, 1e3):
            hidden = random * (largest_logit / F.linear(random, weight).abs().max())
            logits = model(input_ids=ids, use_cache=False).logits
            if not relative_difference(logits, F.linear(hidden, weight, bias)) <= TOLERANCES["fp32"]:
                raise Mismatch("its output head is more than a matrix product")


def check_attention(model):
    """Raise `Mismatch` if a model's attention is not transformers' replaceable one, or not in every layer."""
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        raise Mismatch("its attention cannot be replaced")
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - {"full_attention"}
    if others:  # a sliding window may be wider than the small batch is long
        raise Mismatch(f"it has layers of {', '.join(sorted(others))}")


def loss_and_gradient(model, token_loss, layout, precision):
    """The loss of the small batch in a layout, and the gradient of the last matrix that is not an embedding.

    In 16 bits and on random tokens, the first layers' gradients are mostly rounding; the last one's is not.
    """
    embeddings = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    matrix = [p for p in model.parameters() if p.ndim == 2 and not any(p is other for other in embeddings)][-1]
    batch = layout.collate(random_examples(LENGTHS, len(embeddings[0]))).to(precision.device)
    with in_eval_mode(model):
        with precision.autocast():
            loss = token_loss(model, batch)
        loss.backward()
        gradient = full_tensor(matrix.grad)
        model.zero_grad()
    return loss.detach(), gradient


def compare(model, token_loss, layout, precision, expected):
    """Raise `Mismatch` unless a layout gives the expected loss and gradient; any other failure is an error."""
    try:
        found = loss_and_gradient(model, token_loss, layout, precision)
    except NotImplementedError as error:  # from `packed_attention`
        raise Mismatch(first_line(error)) from error
    for name, ours, own in zip(("loss", "gradient"), found, expected, strict=True):
        difference = relative_difference(ours, own)
        if not difference <= TOLERANCES[precision.name]:  # NaN, too
            raise Mismatch(f"a {name} is off by {difference:.1%}")


def relative_difference(tensor, expected):
    """The norm of a difference between tensors, relative to the norm of the expected one."""
    return ((tensor - expected).norm() / expected.norm()).item()
