"""The self-check before training: which layouts compute a model's loss exactly.

Packed conversations, rows without an attention mask, and the output head applied to supervised tokens alone, are exact
for most models. They are wrong for a model whose layers mix tokens by other means than attention, or that scales its
logits. Nothing is assumed about a model: each conversation of a small batch goes through its own forward pass alone,
then all through each faster layout: in fp32, in which rounding hides nothing, and in the run's precision, which may
have other kernels. A model with sliding windows goes through both a second time, with windows narrower than the
conversations, as otherwise they would leave nothing out.
"""

import contextlib
import itertools
import math
import re
import sys
from dataclasses import replace

import torch
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from compute.adapters import frozen_as, frozen_dtype
from compute.attention import PACKED
from compute.distributed import full_tensor, is_sharded
from compute.layers import (
    checkpoint_activations,
    compile_layers,
    compiled_graphs,
    in_eval_mode,
    undo_compiling,
    without_router_loss,
)
from compute.layout import Layout, random_examples, vocabulary_size
from compute.memory import CPU_TOKENS, GPU_SHARE, measure_micro_batch_budget
from config import UserError, first_line, is_out_of_memory

LENGTHS = (24, 9, 16)  # tokens of the small batch's conversations
NARROW = 3  # tokens of a sliding window in the self-check: one more or less changes a third of what a token sees
# Relative, of loss and gradient: 16 bits round. Where conversations see each other, the difference is a third or more.
TOLERANCES = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}
# On its way back through the layers rounding grows, in SmolLM2 a thousandfold: other kernels of a GPU make 2e-4 of the
# gradient of all weights. So a weight that a layout leaves out (of Doge's mask), whose part may be smaller, is looked
# for by itself: its gradient is zero.
ALL_WEIGHTS, ALL_WEIGHTS_TOLERANCE = "gradient of all weights", 0.01
LEAVE_OUT = "; leave it out"  # of a flag


class Mismatch(Exception):
    """A layout is not exact for a model."""


def choose_layout(
    model, loss_function, config, pad_id, precision, longest=256, budget=0, recorded=None, training=True, long_run=False
):
    """The fastest exact `Layout` for a model, whose attention is set to it.

    To be trained, the model is also made to recompute its activations and compiled, where the flags ask for that.

    Args:
        loss_function: what is checked: `model.token_loss`, or for an evaluation `model.loss_and_correct`.
        longest: tokens of the longest conversation in the data.
        budget: tokens of a micro-batch where `--micro-batch-tokens` does not set it; 0: what the memory allows.
        recorded: `Layout.record` of the run that is resumed, which keeps its layout; None: find the fastest.
        training: False for an evaluation, which computes no gradient and is never compiled.
        long_run: whether compiling pays, where the flags leave it open; a failure is then a warning.

    Raises:
        UserError: no layout is exact, or the requested or recorded one is not, or it cannot be compiled.
    """
    check_positions(model, config, longest)
    exact = replace(precision, name="fp32") if can_compute_in_fp32(model) else precision
    own = Layout(False, 2**20, pad_id, own_logits=True, pinned=precision.device.type == "cuda")
    alone = replace(own, tokens=1)  # each conversation is a micro-batch by itself
    try:
        with failures_as_mismatches():
            check_causal(model, config, exact)
            cases = itertools.product((exact, precision), (False, True) if list_windows(model) else (False,))
            expected = {case: measure(model, loss_function, alone, *case, training) for case in dict.fromkeys(cases)}
    except Mismatch as why:
        raise UserError(f"--model {config.model}: its own forward pass fails, {why}") from why
    layout = find_layout(model, loss_function, config, own, recorded, expected)
    if config.gradient_checkpointing and training:
        checkpoint_activations(model)
    if training and (long_run if config.compile is None else config.compile):
        try:
            compile_and_check(model, loss_function, layout, {(precision, False): expected[precision, False]}, config)
            layout = replace(layout, compiled=True)
        except UserError as error:
            if config.compile:
                raise
            undo_compiling(model)
            print(f"warning: not compiled: {str(error).removesuffix(LEAVE_OUT)}", file=sys.stderr)
    del expected  # gradients, before the free memory is measured
    tokens = config.micro_batch_tokens or budget or (CPU_TOKENS if precision.device.type == "cpu" else 0)
    tokens = tokens or measure_micro_batch_budget(model, loss_function, layout, precision, longest, training)
    return replace(layout, tokens=tokens)


def can_compute_in_fp32(model):
    """False for sharded layers, which keep their precision, and where frozen matrices in fp32 would fill a GPU."""
    if is_sharded(model):
        return False
    if model.device.type == "cpu" or not frozen_dtype(model):
        return True
    in_fp32 = 4 * sum(weights.numel() for weights in model.parameters())
    return in_fp32 < GPU_SHARE * torch.cuda.mem_get_info(model.device)[0]


def find_layout(model, loss_function, config, own, recorded, expected):
    """The first layout that is exact: of all of them, of those that `--layout` allows, or of the recorded one alone."""
    attention, why = model.config._attn_implementation, ""
    padded = [replace(own, own_logits=logits, masked=mask) for logits in (False, True) for mask in (False, True)]
    packed = [replace(layout, packed=True) for layout in padded if not layout.masked]
    allowed = {"packed": packed, "padded": padded, "auto": packed + padded}[config.layout]
    for layout in [replace(own, **recorded)] if recorded else allowed:
        try:
            with failures_as_mismatches():
                if not layout.own_logits:
                    check_head(model, next(iter(expected))[0])
                if layout.packed:
                    check_attention(model)
                use_layout(model, layout)
                compare(model, loss_function, layout, expected)
            return replace(layout, why=why or layout.why)
        except Mismatch as mismatch:
            reason = str(mismatch)
            if layout.packed:
                why = reason
                model.set_attn_implementation(attention)
    if recorded:
        raise UserError(f"--resume: the run's layout is no longer exact for {config.model}, {reason}; change --layout")
    if config.layout == "packed":
        raise UserError(f"--layout packed: not exact for {config.model}, {reason}; use --layout padded")
    raise UserError(f"--model {config.model}: padding changes its loss, {reason}; it cannot be trained")


@contextlib.contextmanager
def failures_as_mismatches():
    """Turn whatever a model's code raises into a `Mismatch`, but for running out of memory."""
    try:
        yield
    except (Mismatch, UserError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        kind = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "  # of `packed_attention`
        raise Mismatch(f"{kind}{first_line(error)}") from error


def use_layout(model, layout):
    """Set the attention of a model, as it was loaded, to what a layout needs."""
    if layout.packed:
        model.set_attn_implementation(PACKED)


def compile_and_check(model, loss_function, eager, expected, config):
    """Compile a model's layers; raise `UserError` if that fails, compiles nothing, or changes the loss or gradient."""
    compile_layers(model)
    layout = replace(eager, compiled=True)
    try:
        is_compiled = count_training_graphs(model, loss_function, eager, next(iter(expected))[0]) > 0
        if is_compiled:
            compare(model, loss_function, layout, expected)
    except Exception as error:  # a `Mismatch`, or a missing compiler
        if is_out_of_memory(error):
            raise
        why = error if isinstance(error, Mismatch) else f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"--compile: {why}{LEAVE_OUT}") from error
    if not is_compiled and config.gradient_checkpointing and layout.packed:
        raise UserError(
            "--compile and --gradient-checkpointing: without the GPU's attention kernel, packed layers that are "
            "recomputed are not compiled; leave one of them out, or use --layout padded"
        )
    if not is_compiled:
        raise UserError(f"--compile: nothing of {config.model} can be compiled{LEAVE_OUT}")


def count_training_graphs(model, loss_function, eager, precision):
    """The number of graphs that the layers become in a training pass, where activations may be recomputed."""
    torch.compiler.reset()  # so that none is there already
    before = compiled_graphs()
    examples = random_examples(LENGTHS, vocabulary_size(model))
    batch = eager.collate(examples)  # without the graph of the output head
    with in_eval_mode(model):
        model.train()
        with precision.autocast():
            loss = loss_function(model, batch.to(precision.device))
        loss.backward()
        model.zero_grad()
    return compiled_graphs() - before


@torch.no_grad()
def check_causal(model, config, precision):
    """Raise `UserError` if the first tokens' logits depend on later tokens: a model like BERT reads both ways."""
    vocabulary = vocabulary_size(model)
    ids = random_examples([8], vocabulary)[0].input_ids.to(precision.device)
    changed = torch.cat([ids[:4], (ids[4:] + 1) % vocabulary])
    options = {"use_cache": False, **without_router_loss(model)}
    with in_eval_mode(model), frozen_as(model, precision), precision.autocast():
        first, second = model(input_ids=torch.stack([ids, changed]), **options).logits[:, :4].float()
    if relative_difference([first], [second]) > TOLERANCES[precision.name]:
        reason = "not a causal language model, as earlier tokens' logits depend on later tokens"
        raise UserError(f"--model {config.model}: {reason}")


def check_positions(model, config, longest):
    """Raise `UserError` if a conversation is longer than a model's positions reach.

    A table of positions ends. LongRoPE and dynamic RoPE choose their frequencies by a micro-batch's largest position.
    """
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
    limit = math.inf if parameters else count_positions(model, text_config)
    if longest > limit:
        raise UserError(f"--model {config.model}: it has {limit:,} positions; use --max-length {limit}")


def count_positions(model, text_config):
    """The length of a model's table of positions, whether learned or computed; infinite for a model without one."""
    named = (*model.named_parameters(), *model.named_buffers())
    tables = [len(t) for name, t in named if re.search(r"pos|wpe", name) and t.ndim == 2 and t.is_floating_point()]
    padding = [  # RoBERTa and its kin number the positions from the one after the padding
        module.padding_idx + 1
        for name, module in model.named_modules()
        if "position" in name and getattr(module, "padding_idx", None) is not None
    ]
    limits = [getattr(text_config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    declared = [limit for limit in limits if limit] if tables or getattr(text_config, "max_seq_len", None) else []
    return min([*tables, *declared], default=math.inf) - max(padding, default=0)


@torch.no_grad()
def check_head(model, precision):
    """Raise `Mismatch` unless the logits are the last hidden states times the output head's matrix, plus its bias.

    A head may also scale its logits, or cap them at c · tanh(x / c), which is x while they are small. So random hidden
    states, with small and with large logits, take the place of the model's own.
    """
    ids = random_examples([8], vocabulary_size(model))[0].input_ids[None].to(precision.device)
    head = model.get_output_embeddings()
    if head is None:
        raise Mismatch("it does not name its output head")
    weight, bias = full_tensor(head.weight), None if head.bias is None else full_tensor(head.bias)
    random = torch.randn(1, 8, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)

    def use_random_states(_module, _inputs, output):
        if hasattr(output, "last_hidden_state"):
            output.last_hidden_state = hidden
        return output

    def multiply_in_fp32(_head, inputs, _logits):  # beside layers in 16 bits, too, which would hide a scale of 1.001
        with torch.autocast(weight.device.type, enabled=False):
            return F.linear(inputs[0].to(weight), weight, bias)

    with contextlib.ExitStack() as hooks, in_eval_mode(model), frozen_as(model, precision), precision.autocast():
        for module in model.base_model.modules():  # the model may call a part of it, such as its decoder
            hooks.enter_context(module.register_forward_hook(use_random_states))
        hooks.enter_context(head.register_forward_hook(multiply_in_fp32))
        for largest_logit in (1.0, 1e3):
            hidden = random * (largest_logit / F.linear(random, weight).abs().max())
            logits = model(input_ids=ids, use_cache=False, **without_router_loss(model)).logits
            if not relative_difference([logits], [multiply_in_fp32(head, [hidden], None)]) <= TOLERANCES["fp32"]:
                raise Mismatch("its output head is more than a matrix product")


def check_attention(model):
    """Raise `Mismatch` if a model's attention is not transformers' replaceable one, or not in every layer."""
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        raise Mismatch("its attention cannot be replaced")
    checked = {"full_attention", "sliding_attention"} if list_windows(model) else {"full_attention"}
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - checked
    if others:  # a chunk, for one, may be longer than the small batch
        raise Mismatch(f"it has layers of {', '.join(sorted(others))}")


def list_windows(model):
    """The modules and the configuration that say how wide a model's sliding windows are."""
    owners = (model.config.get_text_config(), *model.modules())
    return [owner for owner in owners if type(getattr(owner, "sliding_window", None)) is int]


@contextlib.contextmanager
def narrow_windows(model, wanted):
    """Make a model's sliding windows narrow: its masks and what it asks of its attention follow these attributes."""
    widths = [(owner, owner.sliding_window) for owner in list_windows(model) if wanted]
    for owner, width in widths:
        owner.sliding_window = min(width, NARROW)
    try:
        yield
    finally:
        for owner, width in widths:
            owner.sliding_window = width


def measure(model, loss_function, layout, precision, narrow, training):
    """The loss of the small batch in a layout and its gradient, or for an evaluation the loss of each of its tokens.

    The gradient is that of the last large matrix, and in fp32 also that of all weights: in 16 bits and on random
    tokens, the first layers' is mostly rounding. Of a sharded model, the first is the only one that is gathered.
    """
    try:
        losses = []
        with (
            in_eval_mode(model),
            torch.set_grad_enabled(training),
            frozen_as(model, precision),
            narrow_windows(model, narrow),
        ):
            for batch in layout.micro_batches(random_examples(LENGTHS, vocabulary_size(model))):
                with precision.autocast():
                    losses.append(loss_function(model, batch.to(precision.device)))
                if training:
                    losses[-1].backward()
        if not training:
            return {"loss": [torch.cat(losses, 1)[0]]}
        found = {"loss": [sum(losses).detach()], "gradient": [full_tensor(last_large_matrix(model).grad)]}
        if precision.name == "fp32" and not is_sharded(model):
            found[ALL_WEIGHTS] = [p.new_zeros(()) if p.grad is None else p.grad for p in model.parameters()]
        return found
    finally:
        model.zero_grad()


def last_large_matrix(model):
    """The last matrix with a gradient that is neither an embedding nor small, as a router is."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    embeddings = [id(each.weight) for each in ends if each is not None]
    matrices = [p for p in model.parameters() if p.grad is not None and p.ndim > 1 and id(p) not in embeddings]
    width = ends[0].weight.shape[1]
    return ([p for p in matrices if min(p.shape[-2:]) >= width] or matrices)[-1]


def compare(model, loss_function, layout, expected):
    """Raise `Mismatch` unless a layout gives what is expected in each precision, and with narrow windows."""
    for (precision, narrow), own in expected.items():
        found = measure(model, loss_function, layout, precision, narrow, training="gradient" in own)
        for name in own:
            difference = relative_difference(found[name], own[name])
            tolerance = ALL_WEIGHTS_TOLERANCE if name == ALL_WEIGHTS else TOLERANCES[precision.name]
            if not difference <= tolerance:  # NaN, too
                raise Mismatch(f"a {name} is off by {100 * difference:.2g} %")
            if name == ALL_WEIGHTS and (left_out := find_left_out(model, found[name], own[name])):
                raise Mismatch(f"weight {left_out} gets no gradient")


def find_left_out(model, gradients, expected):
    """The name of a weight whose gradient is zero where one beyond rounding in fp32 is expected; None without any."""
    rounding = 1e-5 * get_total_norm(expected)
    named = zip(model.named_parameters(), gradients, expected, strict=True)  # all in the model's order
    return next((name for (name, _), ours, own in named if own.norm() > rounding and not ours.any()), None)


def relative_difference(tensors, expected):
    """The norm of the differences between two lists of tensors, relative to the norm of the expected ones."""
    differences = [ours - own for ours, own in zip(tensors, expected, strict=True)]
    return (get_total_norm(differences) / get_total_norm(expected)).item()
