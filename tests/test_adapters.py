"""Adapters: PEFT and `Trainer` make the same updates; the frozen matrices; files that PEFT, vLLM and llama.cpp read."""

import copy
import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from compute import memory
from compute.adapters import Lora, add_adapters, frozen_dtype, list_matrices, merge_adapters, trained_parameters
from compute.cross_entropy import linear_cross_entropy
from compute.layers import checkpoint_activations
from compute.self_check import choose_layout, use_layout
from config import Config, UserError
from conversations.masking import encode
from model import Precision, load_model, save_adapters, save_model, token_loss
from tests import parity, reference, test_causal_models
from tests.conftest import layout_of, one_batch, tiny_llama
from tests.faults.harness import some
from tests.test_trainer_parity import USUAL, conversations, our_settings
from train import make_optimizer, train_step

CPU = torch.device("cpu")
FP32, BF16 = Precision("fp32", CPU), Precision("bf16", CPU)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 259, "pad_token_id": None}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 259, "n_positions": 512}
GPT2 |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
MODELS = {
    "Llama, tied": ("llama", SMALL | {"tie_word_embeddings": True}),
    "Llama, untied": ("llama", SMALL | {"tie_word_embeddings": False}),
    "GPT-2": ("gpt2", GPT2),
    "Qwen2": ("qwen2", SMALL),
    "Qwen3": ("qwen3", SMALL | {"head_dim": 8}),
    "Gemma": ("gemma", SMALL | {"head_dim": 8}),
    "Phi-3": ("phi3", SMALL),
}
# The ids of the special tokens of these models' configurations lie in the small vocabulary.
ENDS = {"bos_token_id": 0, "eos_token_id": 0}


def build(kind, settings, dtype=torch.float32, seed=0):
    """A small random model of an architecture; always the same weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings, **ENDS), dtype=dtype)


def adapted(kind="llama", settings=MODELS["Llama, tied"][1], rank=4, alpha=8, dtype=torch.float32, frozen=None):
    """Such a model with adapters whose B is drawn too, so that they change something."""
    model = build(kind, settings, dtype)
    add_adapters(model, Lora(rank, alpha, seed=1), frozen)
    draw_b(model)
    return model


def draw_b(model):
    generator = torch.Generator().manual_seed(2)
    for name, weights in trained_parameters(model).items():
        if "lora_B" in name:
            weights.data = 0.1 * torch.randn(weights.shape, generator=generator, dtype=weights.dtype)


def with_peft(model, rank, alpha, ours):
    """A model with PEFT's adapters of all matrices, of the same values as ours have."""
    with warnings.catch_warnings(action="ignore"):  # of GPT-2's transposed matrices
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(model, config)
    theirs = {name: weights for name, weights in wrapped.named_parameters() if weights.requires_grad}
    values = {f"base_model.model.{n}".replace(".weight", ".default.weight"): w for n, w in ours.items()}
    assert theirs.keys() == values.keys()  # the same matrices have adapters
    with torch.no_grad():
        for name, weights in theirs.items():
            weights.copy_(values[name])
    return wrapped


# --- the same updates as PEFT and Trainer make


# Relative, of loss and norm; of weights absolute. Below fp64 an adapter's first gradients are rounding
# where B is zero, and AdamW makes full steps of them: the bound is the sum of the rates.
TOLERANCES = {"fp64": (1e-12, 1e-12, 1e-12), "fp32": (1e-6, 1e-6, 5e-3), "bf16": (1e-4, 1e-2, 5e-3)}


@pytest.mark.parametrize(
    ("kind", "settings", "precision"),
    [
        pytest.param(
            *model,
            precision,
            id=f"{name}-{precision}",
            marks=() if precision == "fp64" or name in ("Llama, untied", "GPT-2") else pytest.mark.slow,
        )
        for name, model in MODELS.items()
        for precision in TOLERANCES
    ],
)
def test_every_update_is_that_of_peft_and_trainer(tiny_tokenizer, tmp_path, kind, settings, precision):
    """In bf16 our frozen matrices are held in 16 bits, and PEFT's in fp32."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    arguments = USUAL | {"learning_rate": 2e-3, "num_train_epochs": 1, "bf16": precision == "bf16"}
    chats = conversations(21)
    our = build(kind, settings, dtype)
    add_adapters(our, Lora(8, 32, seed=3), torch.bfloat16 if precision == "bf16" else None)
    theirs = with_peft(build(kind, settings, dtype), 8, 32, trained_parameters(our))
    rows = [reference.encode(chat, tiny_tokenizer) for chat in chats]
    trainers, _ = reference.train(theirs, rows, [], tiny_tokenizer.pad_token_id, tmp_path / "trainer", **arguments)
    config = our_settings(arguments, output_dir=str(tmp_path / "ours"), micro_batch_tokens=400)
    ours = parity.train(our, encode(chats, tiny_tokenizer), tiny_tokenizer, config)
    adapters = [torch.nn.ParameterList(w for w in m.parameters() if w.requires_grad) for m in (our, theirs)]
    assert any(name.endswith("lora_B.weight") and weights.any() for name, weights in our.named_parameters())
    loss, grad_norm, weights = TOLERANCES[precision]
    parity.compare(ours, trainers, *adapters, loss=loss, grad_norm=grad_norm, weights=weights)


def test_a_is_drawn_as_peft_draws_it_under_the_seed():
    """PEFT's default is the uniform distribution of nn.Linear within 1 / sqrt(inputs); B is zero."""
    model, other, again = (build("llama", SMALL | {"hidden_size": 256}) for _ in range(3))
    for each, seed in ((model, 0), (other, 1), (again, 0)):
        add_adapters(each, Lora(64, 32, seed))
    weights, others, same = ({name: w for name, w in trained_parameters(m).items()} for m in (model, other, again))
    for name, values in weights.items():
        if "lora_B" in name:
            assert not values.any()
            continue
        bound = values.shape[1] ** -0.5
        assert 0.99 * bound < values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert torch.equal(values, same[name])
        assert not torch.equal(values, others[name])


def test_drawing_adapters_leaves_the_global_random_state():
    model = build("llama", SMALL)
    before = torch.get_rng_state()
    add_adapters(model, Lora(4, 8))
    assert torch.equal(torch.get_rng_state(), before)


# --- what is trained, and what is frozen


@pytest.mark.parametrize(("kind", "settings"), MODELS.values(), ids=MODELS)
def test_nothing_is_renamed_and_only_adapters_are_trained(kind, settings):
    names = build(kind, settings).state_dict().keys()
    model = adapted(kind, settings)
    trained = trained_parameters(model)
    assert model.state_dict().keys() - trained.keys() == names
    assert all(re.search(r"\.lora_[AB]\.weight$", name) for name in trained)
    assert len(trained) == 2 * len(list_matrices(model))
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    assert not any(hasattr(end, "lora_A") for end in ends)
    assert {id(w) for group in make_optimizer(model, 0.1).param_groups for w in group["params"]} == {
        id(w) for w in trained.values()
    }


@pytest.mark.parametrize(
    ("packed", "recomputed"),
    some([(True, False), (False, True), (False, False), (True, True)], fast=2),
    ids=["packed-kept", "padded-recomputed", "padded-kept", "packed-recomputed"],
)
@pytest.mark.parametrize(("kind", "settings"), MODELS.values(), ids=MODELS)
def test_frozen_matrices_in_16_bits_change_not_one_bit(ragged_window, kind, settings, packed, recomputed):
    """Autocast would round them at each use; the sum of a gradient, the loss and all updates are the same."""
    results = []
    for frozen in (None, torch.bfloat16):
        model = adapted(kind, settings, frozen=frozen).train()
        layout = layout_of(packed, 90)
        use_layout(model, layout)
        if recomputed:
            checkpoint_activations(model)
        optimizer, options = make_optimizer(model, 0.1), {"scaler": BF16.grad_scaler(), "max_grad_norm": 0.5}
        options["precision"] = BF16
        numbers = [
            train_step(model, optimizer, list(layout.micro_batches(ragged_window)), 1e-2, **options) for _ in range(3)
        ]
        results.append((numbers, {name: w.detach() for name, w in trained_parameters(model).items()}))
        held = {w.dtype for w in (layer.weight for layer in list_matrices(model).values())}
        assert held == {frozen or torch.float32}
        others = [w for w in model.parameters() if w.ndim == 1 or w is model.get_input_embeddings().weight]
        assert {w.dtype for w in others} == {torch.float32}
        assert frozen_dtype(model) == frozen
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_frozen_head_and_frozen_embeddings_get_no_gradient(ragged_window):
    model = adapted()
    token_loss(model, one_batch(ragged_window)).backward()
    assert {name for name, w in model.named_parameters() if w.grad is not None} == trained_parameters(model).keys()
    full = build("llama", SMALL)
    token_loss(full, one_batch(ragged_window)).backward()
    assert full.get_output_embeddings().weight.grad is not None
    hidden = torch.randn(3, 32, requires_grad=True)
    frozen = linear_cross_entropy(hidden, model.get_output_embeddings(), torch.arange(3))
    assert [gradient is not None for gradient in frozen.grad_fn.gradients] == [True, False, False]


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_the_self_check_finds_the_layout_of_a_model_with_adapters(name):
    precision = Precision(name, CPU)
    model = build("llama", SMALL)
    add_adapters(model, Lora(4, 8), precision.dtype)  # B is zero, and so is the gradient of A
    assert choose_layout(model, token_loss, Config(), 0, precision).packed
    windows = build("mistral", SMALL | {"sliding_window": 8})
    add_adapters(windows, Lora(4, 8), precision.dtype)
    assert choose_layout(windows, token_loss, Config(), 0, precision).packed


@pytest.mark.parametrize("name", ["bf16", "fp32"])
@pytest.mark.parametrize("factor", [1.001, 2.0])
def test_a_head_that_scales_its_logits_is_noticed_beside_frozen_matrices(name, factor):
    precision = Precision(name, CPU)
    model = build("llama", SMALL)
    add_adapters(model, Lora(4, 8), precision.dtype)

    def scale(_module, _inputs, output):
        output.logits = factor * output.logits
        return output

    model.register_forward_hook(scale)
    assert choose_layout(model, token_loss, Config(), 0, precision).own_logits


# --- the directory


@pytest.fixture
def base(tmp_path, tiny_tokenizer):
    """A base model on disk."""
    directory = tmp_path / "base"
    tiny_llama(len(tiny_tokenizer)).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


def save_adapters_of(base, tokenizer, directory, **lora):
    """The directory of adapters of a base model, and the model that was saved."""
    model = load_model(str(base), tokenizer, CPU, True, lora=Lora(**({"rank": 4, "alpha": 8, "seed": 1} | lora)))
    draw_b(model)
    directory.mkdir()
    save_model(model, tokenizer, directory)
    return model


def logits(model, dtype=torch.float32):
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        return model.to(dtype).eval()(ids).logits


def test_whatever_loads_adapters_has_the_same_logits(base, tiny_tokenizer, tmp_path):
    directory = tmp_path / "adapters"
    expected = logits(save_adapters_of(base, tiny_tokenizer, directory))
    plain = LlamaForCausalLM.from_pretrained(base)
    assert not torch.allclose(logits(plain), expected, atol=1e-2)
    plain.load_adapter(directory)
    with warnings.catch_warnings(action="error", category=UserWarning):
        loaded = {
            "ours": load_model(str(directory), tiny_tokenizer, CPU),
            "from_pretrained": AutoModelForCausalLM.from_pretrained(directory),
            "PeftModel": peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), directory),
            "AutoPeftModel": peft.AutoPeftModelForCausalLM.from_pretrained(directory),
            "load_adapter": plain,
        }
    for name, model in loaded.items():
        assert torch.equal(logits(model), expected), name
    assert AutoTokenizer.from_pretrained(directory).get_vocab() == tiny_tokenizer.get_vocab()
    assert GenerationConfig.from_pretrained(directory).eos_token_id == tiny_tokenizer.eos_token_id
    names = {path.name for path in directory.iterdir()}
    assert "config.json" not in names  # which would be taken for a model
    assert "model.safetensors" not in names


@pytest.mark.parametrize(("kind", "settings"), MODELS.values(), ids=MODELS)
def test_the_files_are_what_peft_writes(tmp_path, tiny_tokenizer, kind, settings):
    """vLLM and llama.cpp find a layer by the name of its tensors, as PEFT writes them."""
    model = adapted(kind, settings)
    model.lora = replace(model.lora, base={"model": "acme/base@abc", "files": {}})
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    save_model(model, tiny_tokenizer, ours)
    with_peft(build(kind, settings), 4, 8, trained_parameters(model)).save_pretrained(theirs)
    tensors, expected = (load_file(each / "adapter_model.safetensors") for each in (ours, theirs))
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)
    assert safe_open(ours / "adapter_model.safetensors", "pt").metadata() == {"format": "pt"}
    configs = [json.loads((each / "adapter_config.json").read_text()) for each in (ours, theirs)]
    for name in ("peft_type", "task_type", "r", "lora_alpha", "fan_in_fan_out", "inference_mode"):
        assert configs[0][name] == configs[1][name], name
    ends = [{name.rpartition(".")[2] for name in config["target_modules"]} for config in configs]
    assert ends[0] == ends[1]
    assert configs[0].keys() <= configs[1].keys()  # PEFT warns of what it does not know
    assert (configs[0]["base_model_name_or_path"], configs[0]["revision"]) == ("acme/base", "abc")


def test_vllms_rules_of_names_and_shapes(base, tiny_tokenizer, tmp_path):
    """The rules that it documents: lora_A is (rank, inputs), lora_B (outputs, rank), named after the layer, whose
    name ends with a target module; no bias, no rows of embeddings, no modules_to_save, no other kind of scale."""
    directory = tmp_path / "adapters"
    model = save_adapters_of(base, tiny_tokenizer, directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    assert not config.get("modules_to_save")
    assert not config.get("use_rslora")
    assert not config.get("use_dora")
    assert config.get("bias", "none") == "none"
    layers = dict(model.named_modules())
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        layer, part = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", name).groups()
        assert layer.rpartition(".")[2] in config["target_modules"]
        outputs, inputs = layers[layer].weight.shape
        assert tensor.shape == ((4, inputs) if part == "lora_A" else (outputs, 4))


@pytest.mark.parametrize("kind", ["deepseek_v2", "glm4_moe", "qwen3_next", "ernie4_5_moe", "mixtral"])
def test_peft_loads_all_adapters_of_a_mixture(tmp_path, kind):
    model, ids = test_causal_models.build(kind, 1.0), torch.arange(3, 20)[None]
    ours, before = copy.deepcopy(model), model(input_ids=ids).logits
    add_adapters(ours, Lora(4, 8, base={"model": "acme/base", "files": {}}))
    draw_b(ours)
    save_adapters(ours, tmp_path / "adapters", trained_parameters(ours))
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapters")
    adapted = ours(input_ids=ids).logits
    assert torch.equal(theirs(input_ids=ids).logits, adapted)
    assert not adapted.equal(before)


def test_names_are_whole_where_their_ends_would_name_other_layers(tmp_path, tiny_tokenizer):
    model = build("llama", SMALL)
    model.model.layers[0].extra = torch.nn.Module()
    model.model.layers[0].extra.q_proj = torch.nn.Embedding(3, 2)  # PEFT would adapt it, too
    add_adapters(model, Lora(4, 8, base={"model": "acme/base", "files": {}}))
    save_model(model, tiny_tokenizer, tmp_path / "adapters")
    targets = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(list_matrices(model)) == targets


def damage(directory, base, what):
    """Do one of several things to adapters or their base model; returns the start of the error."""
    weights, recorded = base / "model.safetensors", directory / "base_model.json"
    if what == "another weight":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        return rf"{directory}: its base model {base} has changed, model.safetensors is not what the adapters were"
    if what == "another setting":
        (base / "config.json").write_text((base / "config.json").read_text().replace('"silu"', '"gelu"'))
        return rf"{directory}: its base model {base} has changed, config.json is not"
    if what == "a missing base":
        shutil.rmtree(base)
        return rf"{directory}: its base model {base} is missing; put it there again"
    if what == "another program's":
        recorded.unlink()
        return rf"{directory}: there is no base_model.json: these adapters are not of this program"
    if what == "damaged JSON":
        recorded.write_text("{")
        return rf"{directory}/base_model.json: damaged"
    if what == "a truncated file":
        path = directory / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
        return rf"{directory}: its weights are corrupt"
    config = directory / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))
    return rf"{directory}/adapter_model.safetensors: model.layers.0.self_attn.q_proj.lora_A.weight has another shape"


@pytest.mark.parametrize(
    "what",
    [
        "another weight",
        "another setting",
        "a missing base",
        "another program's",
        "damaged JSON",
        "a truncated file",
        "another rank",
    ],
)
def test_what_adapters_cannot_be_used_with_is_one_line(base, tiny_tokenizer, tmp_path, what):
    directory = tmp_path / "adapters"
    save_adapters_of(base, tiny_tokenizer, directory)
    message = damage(directory, base, what)
    with pytest.raises(UserError, match=message) as raised:
        load_model(str(directory), tiny_tokenizer, CPU)
    assert len(str(raised.value).splitlines()) == 1


def test_a_blob_of_the_hubs_cache_is_known_by_its_name(tmp_path):
    from storage.adapter import find_sha256

    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"gigabytes")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert find_sha256(tmp_path / "model.safetensors") == "ab" * 32
    (tmp_path / "plain").write_bytes(b"gigabytes")
    assert find_sha256(tmp_path / "plain") != "ab" * 32


# --- merged


@pytest.mark.parametrize(("kind", "settings"), MODELS.values(), ids=MODELS)
def test_merged_adapters_change_nothing_but_rounding(kind, settings):
    model = adapted(kind, settings, dtype=torch.float64)
    expected, names = logits(model, torch.float64), build(kind, settings).state_dict().keys()
    merge_adapters(model)
    assert model.state_dict().keys() == names
    torch.testing.assert_close(logits(model, torch.float64), expected, rtol=1e-12, atol=1e-12)


def test_layers_that_share_a_matrix_share_the_frozen_one_and_are_not_merged():
    model = build("llama", SMALL)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    add_adapters(model, Lora(4, 8), torch.bfloat16)
    assert second.mlp.up_proj.weight is first.mlp.up_proj.weight
    assert second.mlp.up_proj.lora_A.weight is not first.mlp.up_proj.lora_A.weight
    with pytest.raises(UserError, match="layers of this model share a matrix"):
        merge_adapters(model)


def test_merged_adapters_are_what_peft_merges(base, tiny_tokenizer, tmp_path):
    directory = tmp_path / "adapters"
    save_adapters_of(base, tiny_tokenizer, directory)
    ours = load_model(str(directory), tiny_tokenizer, CPU)
    merge_adapters(ours)
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), directory).merge_and_unload()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=1e-7)


# --- memory

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_8B |= {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}


def plan(directory, settings, config, name="bf16"):
    """What is trained and frozen of a model of these settings, and the bytes of both."""
    CONFIG_MAPPING["llama"](**settings).save_pretrained(directory)
    precision = Precision(name, torch.device("cuda"))
    return memory.count_parameters(memory.outline(str(directory), True, precision, config))


def test_8b_fits_on_a_card_of_24_gb(tmp_path):
    """Arithmetic: 16-bit matrices, fp32 embeddings and head, 16 bytes for each parameter of the adapters."""
    trained, frozen, held = plan(tmp_path, LLAMA_8B, Config(lora_rank=16))
    ends = 2 * 128256 * 4096 + (2 * 32 + 1) * 4096  # embeddings, head, norms
    matrices = 8_030_261_248 - ends
    assert (frozen, trained) == (8_030_261_248, 41_943_040)
    assert held == 2 * matrices + 4 * ends + 16 * trained
    assert 18e9 < held < 19e9
    assert plan(tmp_path, LLAMA_8B, Config())[2] == 16 * 8_030_261_248


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_the_bytes_that_are_planned_are_those_that_are_held(tmp_path, ragged_window, name):
    """An 8B model's shape with two narrow layers: parameters, gradients and moments after an update."""
    settings = LLAMA_8B | {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 2, "vocab_size": 512}
    *_, planned = plan(tmp_path, settings, Config(lora_rank=16), name)
    precision = Precision(name, CPU)
    model = build("llama", settings)
    add_adapters(model, Lora(16, 32), precision.dtype)
    optimizer = make_optimizer(model, 0.1)
    with precision.autocast():
        token_loss(model, one_batch(ragged_window)).backward()
    optimizer.step()
    tensors = [w for p in model.parameters() for w in (p, p.grad) if w is not None]
    tensors += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == planned
    assert Path(tmp_path / "config.json").exists()
