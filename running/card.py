"""The model card of a run's best model: what it is, what it was made of, how to use it."""

import re
from pathlib import Path

from config import QUICKSTART_MODEL, as_text

LICENCES = {QUICKSTART_MODEL: "apache-2.0"}  # of models whose own card is not at hand
SETTINGS = "epochs max_steps batch_size lr warmup_steps weight_decay max_grad_norm max_length supervise seed".split()
USE = """```python
from transformers import pipeline

chat = pipeline("text-generation", model="PATH_OR_ID_OF_THIS_DIRECTORY")
print(chat([{"role": "user", "content": "Who are you?"}], max_new_tokens=100)[0]["generated_text"][-1]["content"])
```"""


def model_card(described, untrained_loss, step, loss):
    """The text of `README.md` in a model's directory.

    Args:
        described: what the run is, as `report.describe` says it.
        untrained_loss, loss: on the eval split, of the untrained model (None: not known) and of this one.
        step: updates that this model has seen.
    """
    config, data = described["config"], described["data"]
    model, datasets = name_of(config["model"]), [name_of(name) for name in config["dataset"]]
    metadata = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [sft, plain-sft]"]
    if licence := licence_of(config["model"]):
        metadata.append(f"license: {licence}")
    if is_hub_id(config["model"]):
        metadata.append(f"base_model: {config['model']}")
    if hub_ids := [name for name in config["dataset"] if is_hub_id(name)]:
        metadata.append(f"datasets: [{', '.join(hub_ids)}]")
    before = "not measured" if untrained_loss is None else f"{untrained_loss:.4f}"
    settings = "\n".join(f"| `{name}` | {as_text(config[name])} |" for name in SETTINGS)
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    return "\n".join(
        [
            "---",
            *metadata,
            "---",
            "",
            f"# {model} on {', '.join(datasets)}",
            "",
            f"{model}, fine-tuned on {data['train']:,} conversations of {', '.join(datasets)} by plain-sft; only the "
            "assistant's messages were supervised. The model is the one with the lowest loss on the "
            f"{data['eval']:,} conversations of the eval split, after {step:,} updates.",
            "",
            "## Use",
            "",
            USE,
            "",
            "It stops at its end-of-turn token. The chat template marks the assistant's tokens (`{% generation %}`).",
            "",
            "## Results",
            "",
            "| | before | this model |",
            "|---|---|---|",
            f"| eval loss | {before} | {loss:.4f} |",
            "",
            "The loss is the mean over supervised tokens.",
            "",
            "## Training",
            "",
            "| setting | |",
            "|---|---|",
            settings,
            f"| precision | {described['precision']} over fp32 weights |",
            f"| data fingerprint | `{data['fingerprint'][:16]}` |",
            "",
            f"Versions: {versions}.",
            "",
        ]
    )


def name_of(text):
    """A model or dataset as a card says it: a Hub id as it is, of a path only the name."""
    return text if is_hub_id(text) else Path(text).name


def is_hub_id(text):
    """Whether a name has the form of a Hub id with an owner, and is no path."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", text)) and not Path(text).exists()


def licence_of(model):
    """The licence of the model that training started from; None where it is not known."""
    card = Path(model) / "README.md"
    if model in LICENCES or not card.is_file():
        return LICENCES.get(model)
    found = re.match(r"---\n(?:.*\n)*?license:\s*(\S+)", card.read_text(encoding="utf-8", errors="replace"))
    return found and found.group(1)
