"""The chat template that a model leaves with: its own marks of the assistant's tokens are our masks."""

import json
from pathlib import Path

import torch

from conversations.masking import encode

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
