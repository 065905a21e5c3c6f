"""The model card of a run's best model. Its text is the template `card.md.jinja`."""

import re
from pathlib import Path

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from config import QUICKSTART_MODEL
from evaluation.facts import escape_markdown, is_hub_id


def model_card(facts):
    """The text of `README.md` for the best model, by the run's `run_facts` when it became the best."""
    settings = facts["settings"]
    base = facts["base"]["model"] if facts["base"] else settings["model"]
    metadata = ModelCardData(
        library_name="peft" if facts["base"] else "transformers",
        pipeline_tag="text-generation",
        tags=["sft", "plain-sft", *(["lora"] if facts["base"] else [])],
        license=find_license(settings["model"]),
        base_model=strip(base) if is_hub_id(base) else None,
        datasets=list(dict.fromkeys(strip(name) for name in settings["dataset"] if is_hub_id(name))) or None,
    )
    environment = jinja2.Environment(finalize=escape_markdown, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8"))
    return f"---\n{metadata.to_yaml()}\n---\n\n{template.render(facts=facts, loss=facts['losses']['eval'])}"


def strip(name):
    """A Hub id without its revision, configuration, split and amount."""
    return re.split("[:@~#]", name)[0]


def find_license(model):
    """The license of the model that training started from; None where it is not known."""
    if model == QUICKSTART_MODEL:  # which comes without a card
        return "apache-2.0"
    try:
        return ModelCard.load(Path(model) / "README.md").data.license
    except Exception:  # there is none, or a foreign file makes the YAML parser raise anything
        return None
