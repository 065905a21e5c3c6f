"""A causal language model: loading and saving it, the precision it computes in, the loss of a micro-batch."""

import contextlib
import json
import re
import sys
import textwrap
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig

from compute import adapters, cross_entropy
from compute.distributed import (
    broadcast_from_rank0,
    check_own_device,
    check_shard,
    is_rank0,
    local_world_size,
    shard,
    world_size,
)
from compute.layers import use_autocast_in_experts, without_router_loss
from config import UserError, first_line
from conversations.templates import stop_ids
from storage import adapter
from storage.hub import LOADING_ERRORS, explain_load_error, is_adapter, model_directory, pretrained

MAX_NEW_EMBEDDINGS = 1024  # for tokens that a tokenizer has and a model has not
# Files of a model that training does not change and that its users may need: of a multimodal model's processors, the
# SentencePiece model that llama.cpp's converter reads, and what its license asks to pass on.
KEPT = ["*processor_config.json", "tokenizer.model"]
KEPT += [f"{name}*" for word in ("license", "notice", "use_policy") for name in (word, word.upper(), word.capitalize())]
# Files that `save_model` writes anew, weights in other formats, and what is about the model that training started from.
REPLACED = re.compile(
    r"(config|generation_config|special_tokens_map|added_tokens|vocab|tokenizer(_config)?|MANIFEST)\.json|README\.md|\..*|"
    r"(adapter_config|base_model)\.json|vocab\.txt|merges\.txt|chat_template\.\w+|additional_chat_templates|.*\.index\.json|"
    r".*\.(safetensors|bin|pt|pth|h5|msgpack|gguf|onnx)"
)
# Old files have masks and frequencies, which are computed now.
COMPUTED = re.compile(r"(inv_freq|position_ids|(\.|^)(attn|attention)\.(masked_)?bias)$")


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
    if device.type == "cuda" and dtype in ("auto", "bf16"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if dtype == "bf16" and not native:
            raise UserError(f"--dtype bf16: {torch.cuda.get_device_name(device)} has no bf16; use auto or fp16")
        dtype = "bf16" if native else "fp16"
    elif dtype == "auto":
        native = any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
        dtype = "bf16" if native else "fp32"
    return Precision(dtype, device)


def choose_device(name):
    """The device of a name; `auto` is the GPU if there is one. Each of several processes gets a GPU of its own.

    That is the GPU of its local rank, or the only one that it sees, as in a task of Slurm's with `--gpus-per-task 1`.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        raise UserError(f"--device {name}: only cpu and cuda are supported")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda":
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: this machine has {count} CUDA devices")
        if world_size() > 1:
            if device.index is not None:
                raise UserError(f"--device {name}: each of several processes takes a GPU of its own; use --device cuda")
            if 1 < count < local_world_size():
                have = f"this machine has {count} CUDA devices for {local_world_size()} processes"
                raise UserError(f"--device cuda: {have}; start fewer")
            device = torch.device("cuda", distributed.get_node_local_rank() if count > 1 else 0)
        if device.index is not None:
            torch.cuda.set_device(device)  # for what libraries put on the current one
    if world_size() > 1:
        check_own_device(device)
    return device


def load_on_ranks(path, tokenizer, precision, shard_count, local_files_only=False, lora=None):
    """The model of `load_model` on every rank, or sharded over `shard_count` ranks each, where that is more than one.

    To shard it, rank 0 reads it into its host memory, in fp32, and broadcasts the weights.
    """
    warn_of_other_files(path)
    options = {"local_files_only": local_files_only, "lora": lora, "frozen_dtype": precision.dtype}
    if shard_count == 1:
        return load_model(path, tokenizer, precision.device, **options)
    check_shard(shard_count)
    full = load_model(path, tokenizer, "cpu", **options) if is_rank0() else None
    if full is not None and not has_expected_tying(full):  # the other ranks know its configuration alone
        reason = "its output head is not its embeddings, as its configuration says"
        raise UserError(f"--model {path}: {reason}; correct tie_word_embeddings there, or use --shard 1")
    return broadcast_sharded(full, shard_count, precision)


def broadcast_sharded(full, shard_count, precision):
    """The model that rank 0 has (None elsewhere), its weights sharded over `shard_count` ranks. All ranks call this."""
    config, generation_config, dtype, lora = broadcast_from_rank0(
        lambda: (full.config, full.generation_config, full.dtype, adapters.get_lora(full))
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_()  # all, as those that are loaded
    if lora:
        adapters.add_adapters(model, lora, precision.dtype)
    model.get_input_embeddings().padding_idx, model.generation_config = None, generation_config
    model.kept_files = getattr(full, "kept_files", {})  # which rank 0 writes
    shard(model, shard_count, precision.device, precision.dtype)
    weights, buffers = (full.state_dict(), dict(full.named_buffers())) if full is not None else ({}, {})
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.named_buffers():  # those that are in no state dict, too: rotary frequencies
        if name in buffers:
            buffer.copy_(buffers[name])
        distributed.broadcast(buffer, 0)
    return model


def load_model(path, tokenizer, device, local_files_only=False, lora=None, frozen_dtype=None):
    """A model with fp32 weights on `device`, with an embedding for every token of the tokenizer.

    Its settings of generation are those it came with, but for the tokenizer's stop, padding and first tokens. Its
    `kept_files`, contents by name, are what `save_model` copies.

    Args:
        path, local_files_only: as `hub.find_model` returns them; a directory of adapters brings its base model.
        lora: a `Lora`, of which the model gets new adapters; None: none but those at `path`.
        frozen_dtype: the dtype in which matrices beside adapters are held; None: fp32.

    Raises:
        UserError: there is no causal language model at `path`, or its weights are not all finite.
    """
    if is_adapter(path):
        return load_adapters(path, tokenizer, device, frozen_dtype)
    try:
        options = {**pretrained(path, local_files_only), "dtype": torch.float32, "output_loading_info": True}
        options |= {"ignore_mismatched_sizes": True}  # which are refused below, by name
        model, report = AutoModelForCausalLM.from_pretrained(**options)
        directory = model_directory(path, local_files_only, KEPT)
        ignored = ignored_weights(model, directory)
    except LOADING_ERRORS as error:
        raise UserError(f"--model {path}: {explain_load_error(path, error)}") from error
    check_loaded_weights(path, report, ignored)
    if is_quantized := getattr(model, "is_quantized", None):
        raise UserError(f"--model {path}: its weights are quantized; use a copy of it in 16 or 32 bits")
    if is_quantized is False:  # its files are, and transformers has converted them, perhaps to 16 bits
        model.float()._weight_conversions = None  # by which plain weights would get the names of quantized ones
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise UserError(f"--model {path}: weight {name} contains NaN or Inf")
    new_rows = len(tokenizer) - model.get_input_embeddings().num_embeddings
    reason = f"its tokenizer has {new_rows:,} more tokens than the model has embeddings"
    if new_rows > MAX_NEW_EMBEDDINGS:
        raise UserError(f"--model {path}: {reason}; they do not belong together")
    if new_rows > 0 and lora:
        raise UserError(f"--model {path}: {reason}, and --lora-rank trains no embeddings; leave it out")
    if new_rows > 0:
        torch.manual_seed(0)  # the new rows are drawn around the mean of the old
        model.resize_token_embeddings(len(tokenizer))
    # Where the padding token was the stop token, its embedding would get no gradient; real padding gets none anyway.
    model.get_input_embeddings().padding_idx = None
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.generation_config = adapt_generation_config(path, model.generation_config, tokenizer)
    kept = {file.name: file for pattern in KEPT for file in sorted(directory.glob(pattern)) if file.is_file()}
    model.kept_files = {name: file.read_bytes() for name, file in kept.items()}
    if lora:
        lora = replace(lora, base=adapter.describe_base(path, local_files_only))
        adapters.add_adapters(model, lora, frozen_dtype)
    use_autocast_in_experts(model)
    return model.to(device)


def load_adapters(directory, tokenizer, device, frozen_dtype):
    """The model of `load_model` with the adapters in a directory, whose base model must be as it was."""
    directory = Path(directory)
    settings = adapter.read_json(directory, adapter.CONFIG)
    path, local_files_only = adapter.find_base(directory)
    model = load_model(path, tokenizer, "cpu", local_files_only)
    base = adapter.check_base(directory)  # its files are there by now, if they were on the Hub
    adapters.add_adapters(model, adapters.Lora(settings["r"], settings["lora_alpha"], base=base), frozen_dtype)
    try:
        tensors = load_file(directory / adapter.WEIGHTS)
    except LOADING_ERRORS as error:
        raise UserError(f"{directory}: {explain_load_error(directory, error)}") from error
    for name, weights in adapters.trained_parameters(model).items():
        found = tensors.pop(adapter.PREFIX + name, None)
        if found is None or found.shape != weights.shape or not found.isfinite().all():
            problem = "is missing" if found is None else "has another shape, or contains NaN or Inf"
            raise UserError(f"{directory / adapter.WEIGHTS}: {name} {problem}; train the adapters again")
        weights.data = found.to(weights)
    for name in tensors:
        raise UserError(f"{directory / adapter.WEIGHTS}: the base model has no layer for {name}")
    return model.to(device)


def adapt_generation_config(path, base, tokenizer):
    """A model's settings of generation with the tokenizer's first, padding and stop tokens.

    Its further stop tokens stay, where they are control tokens. What transformers refuses to save is named.
    """
    settings = base.to_diff_dict()
    further = settings.get("eos_token_id") or []
    further = further if isinstance(further, list) else [further]
    control = tokenizer.added_tokens_decoder.keys() - {tokenizer.pad_token_id}  # others may be a part of a text
    stops = list(dict.fromkeys([*stop_ids(tokenizer), *(token for token in further if token in control)]))
    for name in {"suppress_tokens", "begin_suppress_tokens"} & settings.keys():  # with which it might not stop
        settings[name] = [token for token in settings[name] if token not in stops]
    settings["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    settings |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    for name in ("_from_model_config", "transformers_version"):
        settings.pop(name, None)
    valid = valid_settings(settings)
    if lost := ", ".join(f"{name} {value}" for name, value in settings.items() if name not in valid):
        print(f"warning: {path}: of its settings of generation, transformers refuses to save {lost}", file=sys.stderr)
    return GenerationConfig(**valid)


def valid_settings(settings):
    """The settings of generation that transformers saves together, those first that others depend on.

    Where sampling is neither on nor off, it is on for settings that mean nothing else, as in Llama 2's temperature.
    """
    valid, modes = {}, ("do_sample", "num_beams", "return_dict_in_generate")
    for name in sorted(settings, key=lambda name: name not in modes):
        for mode in ({}, {"do_sample": settings.get("do_sample", True)}):
            with contextlib.suppress(ValueError):
                GenerationConfig(**(more := valid | mode | {name: settings[name]})).validate(strict=True)
                valid = more
                break
    return valid


def ignored_weights(model, directory):
    """The names of weights in a model's files that transformers does not load, nor mention."""
    pattern = "|".join(model._keys_to_ignore_on_load_unexpected or ["(?!)"])
    names = {name for file in directory.glob("model*.safetensors") for name in safe_open(file, "pt").offset_keys()}
    return {name for name in names - model.state_dict().keys() if re.search(pattern, name)}


def warn_of_other_files(path):
    """Name the files of a model that `save_model` neither keeps nor replaces."""
    files = sorted(Path(path).iterdir()) if Path(path).is_dir() else []
    names = [f"{file.name}{'/' if file.is_dir() else ''}" for file in files if not REPLACED.fullmatch(file.name)]
    if others := [name for name in names if not any(fnmatch(name, pattern) for pattern in KEPT)]:
        print(f"not kept with what is saved: {textwrap.shorten(', '.join(others), 300)}", file=sys.stderr)


def check_loaded_weights(path, report, ignored=()):
    """Refuse files that lack weights, by the `output_loading_info`; warn of those not used, or ignored."""
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise UserError(f"--model {path}: its weights {name} have shape {tuple(found)}, the model {tuple(expected)}")
    missing, unused = sorted(report["missing_keys"]), sorted({*report["unexpected_keys"], *ignored})
    unused = [name for name in unused if not COMPUTED.search(name)]
    if missing:
        last = missing[-1]  # the first may be a tied output head, which is not in the files under any name
        renamed = next((name for name in unused if name.endswith(f".{last}")), None)
        repair = renamed and f"remove the prefix {renamed.removesuffix(last)!r} from their names"
        raise UserError(
            f"--model {path}: {len(missing)} of the model's weights are not in its files, such as {missing[0]}; "
            f"{repair or 'save the whole model again'}"
        )
    if unused:
        first = {re.match(r"(model\.)?[^.]*", name)[0]: name for name in reversed(unused)}  # of each part of the model
        names = textwrap.shorten(", ".join(sorted(first.values())), 300)
        found = f"{path} has {len(unused)} weights that the model does not use: {names}"
        print(f"warning: {found}; what is saved will be without them", file=sys.stderr)


def save_model(model, tokenizer, directory, weights=None):
    """Write an ordinary Hugging Face model directory: fp32 weights, tokenizer with its template, generation config.

    Of a model with adapters it is PEFT's: they alone, and no config.json. `weights`, by name and tied ones once, are
    given where the model is sharded or is trained meanwhile; None: the model's.
    """
    try:
        if adapters.get_lora(model):
            save_adapters(model, directory, weights or adapters.trained_parameters(model))
        else:
            model.save_pretrained(directory, state_dict=weights)
    except SafetensorError as error:
        raise OSError(first_line(error)) from error
    tokenizer.save_pretrained(directory)
    for name, content in getattr(model, "kept_files", {}).items():
        if not (directory / name).exists():
            (directory / name).write_bytes(content)
    if (directory / "tokenizer.model").exists():  # which lacks these
        added = {token: id for token, id in tokenizer.get_added_vocab().items() if id >= tokenizer.vocab_size}
        (directory / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")


def save_adapters(model, directory, weights):
    """Write PEFT's files of a model's adapters, and the settings of generation with which its answers stop."""
    directory.mkdir(parents=True, exist_ok=True)
    layers = adapters.list_matrices(model)
    tensors = {adapter.PREFIX + name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(tensors, directory / adapter.WEIGHTS, {"format": "pt"})
    ends = {name.rpartition(".")[2] for name in layers}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    targets = sorted(ends if named == layers.keys() else layers)  # PEFT adapts whatever ends like that
    is_transposed = any(isinstance(layer, adapters.Conv1D) for layer in layers.values())
    adapter.write_config(directory, model.lora, targets, is_transposed)
    model.generation_config.save_pretrained(directory)


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
    output = model.base_model(**batch.inputs, use_cache=False, **without_router_loss(model))
    return output.last_hidden_state.flatten(0, 1).index_select(0, batch.predicting)


def full_logits(model, batch):
    """The same positions' logits, (N, V), of all that the model computes, (B, T, V)."""
    logits = model(**batch.inputs, use_cache=False, **without_router_loss(model)).logits
    return logits.flatten(0, 1).index_select(0, batch.predicting)


def has_expected_tying(model):
    """False if a model's output head is not its input embedding although its configuration ties them."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return tied or not model.config.get_text_config().tie_word_embeddings
