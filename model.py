"""A causal language model: loading and saving it, the precision it runs in, and its logits where they count."""

import contextlib
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig

from chat import IGNORE
from config import UserError, first_line
from hub import LOADING_ERRORS


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


def load_model(path, tokenizer, device, local_files_only=False):
    """A model with fp32 weights on `device`, with an embedding for every token of the tokenizer.

    Args:
        path, local_files_only: as `hub.find_model` returns them.

    Raises:
        UserError: there is no causal language model at `path`, its weights are not all finite, or it computes its
            logits in a way of its own.
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
    check_logits(model, path)
    return model.to(device)


def checkpoint_activations(model):
    """Let a model recompute its activations in the backward pass instead of keeping them."""
    newer = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.17 has only the older one
    enable = newer or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


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


def supervised_logits(model, batch):
    """Logits where a token is supervised, (N, V), and those tokens, (N,); only these N positions reach the output head.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`, each (B, T), as `data.collate` makes them.
    """
    hidden = model.base_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state  # (B, T, H)
    targets = batch["labels"][:, 1:]  # position t predicts token t + 1: the one place where labels are shifted
    supervised = targets != IGNORE
    return model.get_output_embeddings()(hidden[:, :-1][supervised]), targets[supervised]


def token_loss(logits, targets):
    """Sum of the token losses, in fp32 (fp64 for fp64 logits): cross-entropy of (N, V) logits with (N,) targets."""
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="sum")


@torch.no_grad()
def check_logits(model, path):
    """Raise `UserError` unless `supervised_logits` are the model's own: some models scale or cap theirs at the end."""
    ids = torch.arange(1, 9).remainder(model.get_input_embeddings().num_embeddings)[None]  # (1, T)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model.eval()
    ours, own = supervised_logits(model, batch)[0], model(**batch).logits[0, :-1]
    if not torch.allclose(ours, own, rtol=1e-4, atol=1e-4):
        raise UserError(
            f"--model {path}: it scales or caps its logits after the output head, which the loss here does not"
        )


def ties_hold(model):
    """Whether a model that says its output head is its input embedding has it so."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return tied or not model.config.get_text_config().tie_word_embeddings
