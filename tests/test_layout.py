"""Collation: micro-batches are a partition of a window within the budget, and collated before they are needed."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compute.layout import PrefetchedWindows
from conversations.masking import IGNORE, Example
from data import window_at
from tests.conftest import layout_of, one_batch

ROWS = [Example(torch.tensor([8]), torch.tensor([8])), Example(torch.tensor([5, 6, 7]), torch.tensor([IGNORE, 6, 7]))]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 200), st.booleans())
def test_micro_batches_are_a_partition_within_the_budget_largest_first(lengths, budget, packed):
    examples = [Example(torch.full((length,), number), torch.zeros(length)) for number, length in enumerate(lengths)]
    cut = layout_of(packed, budget).plan_micro_batches(examples)
    numbers = [int(example.input_ids[0]) for micro_batch in cut for example in micro_batch]
    assert sorted(numbers) == list(range(len(lengths)))
    sizes = [[len(example.input_ids) for example in micro_batch] for micro_batch in cut]
    taken = [sum(size) if packed else len(size) * max(size) for size in sizes]
    assert all(tokens <= budget or len(size) == 1 for tokens, size in zip(taken, sizes, strict=True))
    assert all(size == sorted(size, reverse=True) for size in sizes)
    if packed:
        assert taken == sorted(taken, reverse=True)
        assert all(first + second > budget for first, second in itertools.pairwise(taken))
    else:
        assert [size[0] for size in sizes] == sorted([size[0] for size in sizes], reverse=True)


def test_padded_rows():
    batch = one_batch(ROWS)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (batch.predicting.tolist(), batch.targets.tolist(), batch.tokens) == ([0, 1], [6, 7], 4)


def test_padded_rows_without_a_mask_are_the_same_but_for_it():
    batch, masked = replace(layout_of(packed=False), masked=False).collate(ROWS), layout_of(packed=False).collate(ROWS)
    assert batch.inputs.keys() == {"input_ids"}
    assert torch.equal(batch.inputs["input_ids"], masked.inputs["input_ids"])
    assert torch.equal(batch.predicting, masked.predicting)
    assert torch.equal(batch.targets, masked.targets)


def test_packed_conversations():
    batch = one_batch(ROWS, packed=True)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert batch.inputs["cu_seqlens"].tolist() == [0, 3, 4]
    assert batch.inputs["cu_seqlens"].dtype == torch.int32
    assert batch.inputs["max_seqlen"] == 3
    assert (batch.predicting.tolist(), batch.targets.tolist(), batch.tokens) == ([0, 1], [6, 7], 4)


def test_no_first_token_is_predicted_from_the_conversation_before_it():
    rows = [Example(torch.tensor(ids), torch.tensor(ids)) for ids in ([5, 6], [7, 8])]
    assert sorted(one_batch(rows, packed=True).targets.tolist()) == [6, 8]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_every_tensor_moves_to_the_device(ragged_window, packed):
    batch = one_batch(ragged_window, packed).to("meta")
    tensors = [batch.predicting, batch.targets, *(each for each in batch.inputs.values() if torch.is_tensor(each))]
    assert len(tensors) == (5 if packed else 4)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_windows_are_prefetched_in_order(ragged_window):
    windows = PrefetchedWindows(ragged_window, 3, 42, layout_of(packed=True))
    for step in (0, 1, 1, 2, 5, 3):  # an overflow asks for a window again
        collated = windows.prefetch.cache_info().misses
        (batch,) = windows.get(step)
        expected = one_batch(window_at(step, ragged_window, 3, 42), packed=True)
        assert torch.equal(batch.inputs["input_ids"], expected.inputs["input_ids"])
        # nothing but this window: that would take Python's time from launching this update
        collated += step not in (1, 2)
        assert windows.prefetch.cache_info().misses == collated
        windows.prefetch(step + 1)
        assert windows.prefetch.cache_info().currsize == 2


def test_an_error_in_prefetching_is_raised_by_get():
    with pytest.raises(ZeroDivisionError):
        PrefetchedWindows([], 3, 42, layout_of(packed=True)).get(0)
