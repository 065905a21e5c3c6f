"""A causal language model: loading and saving it, the precision it runs in, its loss where tokens are supervised."""

import contextlib
import ctypes
import sys
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig

import loss
from config import UserError, first_line
from hub import LOADING_ERRORS

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Precision:
    """What the forward pass computes in; the weights and the optimizer are fp32 whatever it is."""

    name: str  # bf16, fp16 or fp32
    device: torch.device

    def autocast(self):
        """A context in which matrix products run in this precision."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[self.name])

    def describe(self):
        """The device and the precision, as a plan says it."""
        if self.device.type == "cpu":
            return f"{self.device} ({torch.get_num_threads()} threads), {self.name}"
        name = torch.cuda.get_device_name(self.device)
        return f"{self.device} ({name}), {self.name}{' (TF32 is off)' if self.name == 'fp32' else ''}"

    def grad_scaler(self):
        """The scaler that keeps fp16 gradients from vanishing; it does nothing in any other precision."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def choose_precision(device="auto", dtype="auto"):
    """The `Precision` that flags ask for; `auto` is the GPU, and bf16 where native, else fp16 on a GPU, else fp32.

    Raises:
        UserError: the device is unknown or not in this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: not a device") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    if dtype == "auto" and device.type == "cuda":
        dtype = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif dtype == "auto":
        native = any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
        dtype = "bf16" if native else "fp32"
    return Precision(dtype, device)


def keep_freed_memory():
    """Have glibc keep the memory of freed tensors for the next ones, on a CPU.

    It otherwise gives much of it back to the kernel, which clears and maps it anew for the next tensor: a fifth of the
    time of an update. See mallopt(3); without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for setting, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26)):
            mallopt(setting, value)


def load_model(path, tokenizer, device, local_files_only=False):
    """A model with fp32 weights on `device`, with an embedding for every token of the tokenizer.

    Args:
        path, local_files_only: as `hub.find_model` returns them.

    Raises:
        UserError: there is no causal language model at `path`, or its weights are not all finite.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=local_files_only, trust_remote_code=False
        )
    except LOADING_ERRORS as error:
        raise UserError(f"--model {path}: {first_line(error)}") from error
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise UserError(f"--model {path}: its weights {name} are not all finite numbers")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        torch.manual_seed(0)  # the new rows are drawn around the mean of the old
        model.resize_token_embeddings(len(tokenizer))
    # Where the padding token was the stop token, its embedding would get no gradient; real padding gets none anyway.
    model.get_input_embeddings().padding_idx = None
    model.config.pad_token_id, model.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model.to(device)


def checkpoint_activations(model):
    """Let a model recompute its activations in the backward pass instead of keeping them."""
    newer = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.17 has only the older one
    enable = newer or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_layers(model):
    """Have `torch.compile` compile a model's layers, all into the same few graphs, when they are first called.

    One layer at a time, because they are alike: 30 of them compile as fast as one.
    """
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):  # transformers' list of the layers' classes
            module.compile(dynamic=True)


def compiled_graphs():
    """How many graphs `torch.compile` has made in this process; it should stop growing after the first update."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def save_model(model, tokenizer, directory):
    """Write an ordinary Hugging Face model directory: fp32 weights, tokenizer with its template, generation config.

    Raises:
        OSError: the disk is full, say.
    """
    try:
        model.save_pretrained(directory)
    except SafetensorError as error:
        raise OSError(first_line(error)) from error
    tokenizer.save_pretrained(directory)


def token_loss(model, batch):
    """Sum of the token losses of a `layout.Batch`, in fp32 (fp64 for a model in fp64)."""
    if batch.own_logits:
        logits, targets = own_logits(model, batch), batch.targets
        return F.cross_entropy(logits.to(loss.summed_in(logits)), targets, reduction="sum")
    return loss.linear_cross_entropy(supervised_states(model, batch), model.get_output_embeddings(), batch.targets)


def loss_and_correct(model, batch):
    """That sum, and how many supervised tokens the model ranks first: (2,), in fp64, without a gradient."""
    if batch.own_logits:
        return loss.of_logits(own_logits(model, batch), batch.targets)
    return loss.loss_and_correct(supervised_states(model, batch), model.get_output_embeddings(), batch.targets)


@contextlib.contextmanager
def in_eval_mode(model):
    """Switch a model's dropout and the like off, and afterwards back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def supervised_states(model, batch):
    """Hidden states where the next token is supervised, (N, H): only these go through the output head."""
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, H)
    return hidden.flatten(0, 1).index_select(0, batch.predicting)


def own_logits(model, batch):
    """The same positions' logits, (N, V), out of all those that the model itself makes, (B, T, V)."""
    logits = model(**batch.inputs, use_cache=False).logits
    return logits.flatten(0, 1).index_select(0, batch.predicting)


def ties_hold(model):
    """Whether a model that says its output head is its input embedding has it so."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return tied or not model.config.get_text_config().tie_word_embeddings
