"""This program's ids and labels compared with the reference rule's and TRL's, on conversation files of your own.

    python -m benchmarks.masks examples/quickstart.jsonl more.jsonl

Exit status 1 if a difference from the reference is not one of its known mistakes.
"""

import warnings
from collections import Counter
from pathlib import Path

import datasets

from config import QUICKSTART_MODEL, Parser, run_command
from conversations.formats import read_conversations
from conversations.masking import IGNORE, encode
from conversations.sources import parse_source
from conversations.tokenizer import load_tokenizer
from storage import hub
from tests import reference


def main(argv):
    parser = Parser(description="Compare the masks of conversation files with the reference and TRL.")
    parser.add_argument("--model", default=QUICKSTART_MODEL, help="whose tokenizer to use (default %(default)s)")
    parser.add_argument("files", nargs="+", metavar="FILE", help="a .jsonl file of conversations")
    options = parser.parse_args(argv)
    hub.quiet_libraries()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)
    tokenizer = load_tokenizer(*hub.find_model(options.model))
    unexplained = 0
    for path in options.files:
        conversations = [messages for _, _, messages in read_conversations([parse_source(path)])]
        ours = [
            {"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in encode(conversations, tokenizer)
        ]
        replies = sum(message["role"] == "assistant" for messages in conversations for message in messages)
        multi_turn = sum(sum(m["role"] == "assistant" for m in messages) > 1 for messages in conversations)
        print(
            f"{Path(path).name}: {len(conversations):,} conversations, {multi_turn:,} multi-turn, {replies:,} replies"
        )
        for line in compare_with_reference(conversations, ours, tokenizer):
            print(f"  {line}")
            unexplained += line.endswith("no known reason")
        by_offsets = [reference.encode_by_offsets(messages, tokenizer) for messages in conversations]
        same = sum(our == row for our, row in zip(ours, by_offsets, strict=True))
        print(f"  by character offsets: {same:,} same ids and labels")
        print(f"  TRL: {compare_with_trl(conversations, ours, tokenizer)}")
    return 1 if unexplained else 0


def compare_with_reference(conversations, ours, tokenizer):
    """Yield a line for the conversations with the reference's ids and labels, and one for each reason to differ."""
    reasons = Counter()
    for messages, row in zip(conversations, ours, strict=True):
        if row == reference.encode(messages, tokenizer):
            reasons["same ids and labels"] += 1
        else:
            reasons[
                "different, because " + (", ".join(reference.mistakes(messages, tokenizer)) or "no known reason")
            ] += 1
    for reason, count in reasons.most_common():
        yield f"the reference: {count:,} {reason}"


def compare_with_trl(conversations, ours, tokenizer):
    """Count the conversations with TRL's ids and labels, those with its ids alone, and the tokens that differ there."""
    counts = Counter()
    for our, row in zip(ours, reference.encode_with_trl(conversations, tokenizer), strict=True):
        if our["input_ids"] != row["input_ids"]:
            counts["with other ids"] += 1
        elif our["labels"] == row["labels"]:
            counts["same ids and labels"] += 1
        else:
            counts["with the same ids, but other labels"] += 1
            for token, mine, theirs in zip(our["input_ids"], our["labels"], row["labels"], strict=True):
                if mine != theirs:
                    who = "TRL" if mine == IGNORE else "we"
                    counts[f"{tokenizer.decode([token])!r} tokens that only {who} train"] += 1
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


if __name__ == "__main__":
    run_command(main)
