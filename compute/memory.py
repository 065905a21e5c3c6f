"""Memory: whether a model fits on a GPU, how many tokens a micro-batch may have, and how a CPU reuses freed memory."""

import ctypes
import math
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compute.adapters import Lora, add_adapters
from compute.cross_entropy import GPU_ROWS, LOGIT_BYTES, chunk_rows
from compute.distributed import all_reduce_max, is_sharded
from compute.layout import random_examples, vocabulary_size
from config import UserError, is_out_of_memory
from storage.adapter import find_base
from storage.hub import LOADING_ERRORS, explain_load_error, pretrained

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # from glibc's malloc.h
CPU_TOKENS = 1536  # in a micro-batch; a CPU is no faster with more, and in SmolLM2 they cost 1 MB each
GPU_TOKENS = 2**16  # at most
GPU_SHARE = 0.8  # of the free memory; an allocator cannot use the rest
SAMPLE = GPU_ROWS  # tokens of the first micro-batch that is measured: all that the output head takes at once
PROBES = 8  # micro-batches that are measured at most
TRAINED_BYTES = 16  # of a parameter that is trained: fp32 weight, gradient and AdamW's two moments


def check_model_fits(path, local_files_only, precision, config, longest=GPU_TOKENS):
    """Raise `UserError` if the model at `path`, which is not loaded, is too large to be trained on a GPU.

    `longest` is the tokens of the longest conversation, which limits the logits that are held at once.
    """
    model = outline(path, local_files_only, precision, config)
    free, _ = torch.cuda.mem_get_info(precision.device)
    trained, frozen, needed = count_parameters(model)
    transient = transient_bytes(model, precision, longest, config.shard > 1)
    if needed / config.shard + transient > free:
        room = GPU_SHARE * free - transient_bytes(model, precision, longest, sharded=True)
        remedy = f", or several processes with --shard {math.ceil(needed / room)}" if room > 0 else ""
        beside = f" beside {frozen:,} frozen ones" if frozen else ""
        adapters = "" if config.lora_rank else ", adapters (--lora-rank 16)"
        raise UserError(
            f"--model {config.model}: training {trained:,} parameters{beside} takes "
            f"{(needed + transient) / 1e9:.1f} GB without activations (weights, gradients, AdamW; in a pass also "
            f"16-bit weights and logits), and {precision.device} has {free / 1e9:.1f} GB free; use a smaller "
            f"model{adapters}{remedy}"
        )


def outline(path, local_files_only, precision, config):
    """The model that a `Config` trains, of the configuration at `path`, on "meta": its shapes and dtypes, no values."""
    try:
        base = find_base(path, local_files_only)
        model_config = AutoConfig.from_pretrained(**pretrained(*base))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    except LOADING_ERRORS as error:
        raise UserError(f"--model {path}: {explain_load_error(path, error)}") from error
    if config.lora_rank:
        add_adapters(model, Lora.of(config), precision.dtype)
    return model


def count_parameters(model):
    """The parameters of a model that are trained and those that are not, and the bytes that training holds of them."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = [p for p in parameters if not p.requires_grad]
    frozen_bytes = sum(p.numel() * p.element_size() for p in frozen)
    return trained, sum(p.numel() for p in frozen), TRAINED_BYTES * trained + frozen_bytes


def transient_bytes(model, precision, longest, sharded):
    """The bytes that a pass takes besides activations: autocast's 16-bit copies, the head's gradient, its logits.

    Of sharded weights the embeddings and the head are gathered, with their gradients; one layer at a time is little.
    What is frozen has no gradient, and its matrices are in 16 bits already.
    """
    embeddings = model.get_input_embeddings().weight
    head = getattr(model.get_output_embeddings(), "weight", embeddings)  # not every model names its head
    others = 0 if embeddings is head else embeddings.numel()
    wide = sum(weights.numel() for weights in model.parameters() if weights.dtype.itemsize > 2)
    copied = 0 if precision.dtype is None else 2 * (head.numel() if sharded else wide - others)
    gradient = 4 if head.requires_grad else 0
    logits = min(longest, chunk_rows(len(head), precision.device)) * len(head)
    logit_bytes = 8 if precision.dtype is None else LOGIT_BYTES
    return copied + gradient * head.numel() + logits * logit_bytes + sharded * (4 + gradient) * (head.numel() + others)


def measure_micro_batch_budget(model, token_loss, layout, precision, longest, training):
    """The number of tokens that a micro-batch may have on a GPU, padding counted.

    It is that of the largest of a few micro-batches whose passes were measured and fit, with the gradients in memory
    and room for AdamW's two moments. For an evaluation the forward pass is measured alone. All ranks measure the same
    micro-batches, as those that share weights wait for each other.

    Raises:
        UserError: the longest conversation does not fit by itself.
    """
    device, was_training = precision.device, model.training
    model.train(training)

    def measure(tokens):
        return all_reduce_max(probe_pass(model, token_loss, layout, precision, choose_lengths(layout, tokens, longest)))

    try:
        before = torch.cuda.memory_allocated(device)
        measure(longest)
        moments = 2 * (torch.cuda.memory_allocated(device) - before)  # AdamW's, by what remains: the gradients
        torch.cuda.empty_cache()
        free = -all_reduce_max(float(moments - torch.cuda.mem_get_info(device)[0]))
        taken = measure(longest)
        if taken > free:
            kept = training and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            raise UserError(
                f"out of memory: a conversation of {longest:,} tokens does not fit on {device} by itself; use "
                f"{'--gradient-checkpointing, ' if kept else ''}a lower --max-length or a smaller model"
            )
        return search_tokens(measure, longest, taken, GPU_SHARE * free, unit=1 if layout.packed else longest)
    finally:
        model.zero_grad()
        model.train(was_training)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # what is reported is the run's


def search_tokens(measure, tokens, taken, room, unit):
    """The most tokens, a multiple of `unit`, that were measured and fit into `room` bytes; `tokens` take `taken` bytes.

    The output head needs the most memory in small micro-batches and the layers in large ones, so that small ones do not
    tell what large ones take. As neither grows faster than in proportion to the tokens, `sure` tokens fit; `likely` fit
    if the memory grows as between the last two that were measured. What is measured next lies between these numbers.
    """
    over, wanted = None, max(SAMPLE, tokens * room / taken)
    for _ in range(PROBES if taken < room else 0):
        wanted = int(min(wanted, GPU_TOKENS))
        grid = 2 ** max(0, wanted.bit_length() - 5)  # the same result for about the same memory
        wanted -= wanted % grid
        wanted = max(wanted - wanted % unit, tokens + unit if unit > grid else 0)
        if not tokens < wanted < (over or GPU_TOKENS + 1):
            break
        found = measure(wanted)
        slope = (found - taken) / (wanted - tokens)
        if found > room:
            over = wanted
        else:
            tokens, taken = wanted, found
        sure = tokens * room / taken
        likely = over or (tokens + (room - taken) / slope if slope > 0 else GPU_TOKENS)
        wanted = min(math.sqrt(sure * max(sure, likely)), (over or math.inf) - 1)
    return tokens


def choose_lengths(layout, tokens, longest):
    """The lengths of a micro-batch's conversations: as long as they can be, which needs the most memory."""
    count, rest = divmod(tokens, longest)
    if layout.packed:
        return [longest] * count + [rest] * (rest > 0)
    return [longest] + [max(1, longest - 1)] * (count - 1)  # rows of equal lengths would need no mask


def probe_pass(model, token_loss, layout, precision, lengths):
    """The bytes that the passes over a random micro-batch took at their peak; infinite where memory ran out."""
    torch.cuda.empty_cache()  # a pass that did not fit leaves fragments
    before = torch.cuda.memory_allocated(precision.device)
    torch.cuda.reset_peak_memory_stats(precision.device)
    batch = layout.collate(random_examples(lengths, vocabulary_size(model)))
    try:
        with precision.autocast(), torch.set_grad_enabled(model.training):
            loss = token_loss(model, batch.to(precision.device))
        if model.training:
            loss.backward()
    except (RuntimeError, MemoryError) as error:
        if is_sharded(model) or not is_out_of_memory(error):  # the other ranks wait in a collective for this one
            raise
        return math.inf
    return float(torch.cuda.max_memory_allocated(precision.device) - before)


def keep_freed_memory():
    """Make glibc keep the memory of freed tensors for the next ones, on a CPU; see mallopt(3).

    By default glibc returns much of it to the kernel, which clears and maps it again for the next tensor: a fifth of
    the time of an update. Blocks above 32 MB are returned: if kept, small ones are cut out of them, and a run grows
    with every update (docs/performance.md). Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, 2**26)
