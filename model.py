"""A causal language model: loading and saving it, the precision it computes in, the loss of a micro-batch."""

import contextlib
import re
import sys
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig

from compute import cross_entropy
from compute.distributed import broadcast_from_rank0, check_shard, is_rank0, local_world_size, shard, world_size
from config import UserError, first_line
from conversations.templates import stop_ids
from storage.hub import LOADING_ERRORS, explain_load_error, pretrained

MAX_NEW_EMBEDDINGS = 1024  # for tokens that a tokenizer has and a model has not


@dataclass(frozen=True)
class Precision:
    """The precision of the forward pass, and its device; weights and optimizer are fp32 in any case."""

    name: str  # bf16, fp16 or fp32
    device: torch.device

    @property
    def dtype(self):
        """The dtype of matrix products; None: that of the weights."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[self.name]

    def autocast(self):
        """A context in which matrix products run in this precision."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def describe(self):
        """The device and the precision, as the plan prints them."""
        if self.device.type == "cpu":
            return f"{self.device} ({torch.get_num_threads()} threads), {self.name}"
        note = " (TF32 is off)" if self.name == "fp32" else ""
        return f"{self.device} ({torch.cuda.get_device_name(self.device)}), {self.name}{note}"

    def grad_scaler(self):
        """The scaler that keeps fp16 gradients from vanishing, disabled in other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def choose_precision(device="auto", dtype="auto"):
    """The `Precision` that flags ask for; `auto` is bf16 where it is native, else fp16 on a GPU and fp32 on a CPU."""
    device = choose_device(device)
    if dtype == "auto" and device.type == "cuda":
        dtype = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif dtype == "auto":
        native = any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
        dtype = "bf16" if native else "fp32"
    return Precision(dtype, device)


def choose_device(name):
    """The device of a name; `auto` is the GPU if there is one. Each of several processes gets a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        raise UserError(f"--device {name}: only cpu and cuda are supported")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cpu":
        return device
    if (device.index or 0) >= count:
        raise UserError(f"--device {name}: this machine has {count} CUDA devices")
    if world_size() > 1:
        if device.index is not None:
            raise UserError(f"--device {name}: each of several processes takes a GPU of its own; use --device cuda")
        if count < local_world_size():
            have = f"this machine has {count} CUDA devices for {local_world_size()} processes"
            raise UserError(f"--device cuda: {have}; start fewer")
        device = torch.device("cuda", distributed.get_node_local_rank())
    if device.index is not None:
        torch.cuda.set_device(device)  # for what libraries put on the current one
    return device


def load_on_ranks(path, tokenizer, precision, shard_count, local_files_only=False):
    """The model of `load_model` on every rank, or sharded over `shard_count` ranks each, where that is more than one.

    To shard it, rank 0 reads it into its host memory, in fp32, and broadcasts the weights.
    """
    if shard_count == 1:
        return load_model(path, tokenizer, precision.device, local_files_only)
    check_shard(shard_count)
    full = load_model(path, tokenizer, "cpu", local_files_only) if is_rank0() else None
    if full is not None and not has_expected_tying(full):  # the other ranks know its configuration alone
        reason = "its output head is not its embeddings, as its configuration says"
        raise UserError(f"--model {path}: {reason}; correct tie_word_embeddings there, or use --shard 1")
    return broadcast_sharded(full, shard_count, precision)


def broadcast_sharded(full, shard_count, precision):
    """The model that rank 0 has (None elsewhere), its weights sharded over `shard_count` ranks. All ranks call this."""
    config, generation_config, dtype = broadcast_from_rank0(lambda: (full.config, full.generation_config, full.dtype))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.get_input_embeddings().padding_idx, model.generation_config = None, generation_config
    shard(model, shard_count, precision.device, precision.dtype)
    weights, buffers = (full.state_dict(), dict(full.named_buffers())) if full is not None else ({}, {})
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.named_buffers():  # those that are in no state dict, too: rotary frequencies
        if name in buffers:
            buffer.copy_(buffers[name])
        distributed.broadcast(buffer, 0)
    return model


def load_model(path, tokenizer, device, local_files_only=False):
    """A model with fp32 weights on `device`, with an embedding for every token of the tokenizer.

    Args:
        path, local_files_only: as `hub.find_model` returns them.

    Raises:
        UserError: there is no causal language model at `path`, or its weights are not all finite.
    """
    try:
        options = {**pretrained(path, local_files_only), "dtype": torch.float32, "output_loading_info": True}
        model, report = AutoModelForCausalLM.from_pretrained(
            **options, ignore_mismatched_sizes=True
        )  # mismatched sizes are refused below, by name
    except LOADING_ERRORS as error:
        raise UserError(f"--model {path}: {explain_load_error(path, error)}") from error
    check_loaded_weights(path, report)
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise UserError(f"--model {path}: weight {name} contains NaN or Inf")
    new_rows = len(tokenizer) - model.get_input_embeddings().num_embeddings
    if new_rows > MAX_NEW_EMBEDDINGS:
        reason = f"its tokenizer has {new_rows:,} more tokens than the model has embeddings"
        raise UserError(f"--model {path}: {reason}; they do not belong together")
    if new_rows > 0:
        torch.manual_seed(0)  # the new rows are drawn around the mean of the old
        model.resize_token_embeddings(len(tokenizer))
    # Where the padding token was the stop token, its embedding would get no gradient; real padding gets none anyway.
    model.get_input_embeddings().padding_idx = None
    model.config.pad_token_id, model.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    stops = stop_ids(tokenizer)
    stops = stops if len(stops) > 1 else stops[0]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    return model.to(device)


def check_loaded_weights(path, report):
    """Raise `UserError` if a model's files lack weights, by the `output_loading_info`; warn of those not used."""
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise UserError(f"--model {path}: its weights {name} have shape {tuple(found)}, the model {tuple(expected)}")
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        last = missing[-1]  # the first may be a tied output head, which is not in the files under any name
        renamed = next((name for name in unused if name.endswith(f".{last}")), None)
        repair = renamed and f"remove the prefix {renamed.removesuffix(last)!r} from their names"
        raise UserError(
            f"--model {path}: {len(missing)} of the model's weights are not in its files, such as {missing[0]}; "
            f"{repair or 'save the whole model again'}"
        )
    if unused:
        print(f"warning: {path} has {len(unused)} weights that the model does not use: {unused[0]}", file=sys.stderr)


def save_model(model, tokenizer, directory, weights=None):
    """Write an ordinary Hugging Face model directory: fp32 weights, tokenizer with its template, generation config.

    Args:
        weights: by name, tied ones once, where the model is sharded or is trained meanwhile; None: the model's.
    """
    try:
        model.save_pretrained(directory, state_dict=weights)
    except SafetensorError as error:
        raise OSError(first_line(error)) from error
    tokenizer.save_pretrained(directory)


def token_loss(model, batch):
    """Sum of the token losses of a `layout.Batch`, in fp32 (fp64 for a model in fp64)."""
    if batch.own_logits:
        logits = full_logits(model, batch)
        return F.cross_entropy(logits.to(cross_entropy.accumulation_dtype(logits)), batch.targets, reduction="sum")
    hidden, head = supervised_states(model, batch), model.get_output_embeddings()
    return cross_entropy.linear_cross_entropy(hidden, head, batch.targets, batch.compiled)


def loss_and_correct(model, batch):
    """The token losses, and which supervised tokens the model ranks first: (2, N), in fp64, without a gradient."""
    if batch.own_logits:
        return cross_entropy.loss_and_correct_from_logits(full_logits(model, batch), batch.targets)
    return cross_entropy.loss_and_correct(supervised_states(model, batch), model.get_output_embeddings(), batch.targets)


def supervised_states(model, batch):
    """Hidden states where the next token is supervised, (N, H): only these go through the output head."""
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, H)
    return hidden.flatten(0, 1).index_select(0, batch.predicting)


def full_logits(model, batch):
    """The same positions' logits, (N, V), of all that the model computes, (B, T, V)."""
    logits = model(**batch.inputs, use_cache=False).logits
    return logits.flatten(0, 1).index_select(0, batch.predicting)


def has_expected_tying(model):
    """False if a model's output head is not its input embedding although its configuration ties them."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return tied or not model.config.get_text_config().tie_word_embeddings
