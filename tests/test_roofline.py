"""The prediction of a GPU's speed counts what it says that it counts."""

import pytest
import torch

from benchmarks import roofline
from benchmarks.roofline import fuse_kernels, predict, sum_seconds, trace_update


def test_what_lies_between_two_products_is_one_kernel_that_moves_only_what_others_need():
    product = (100, [("a", 8)], [("b", 8)])
    first, second = (0, [("b", 8)], [("c", 4)]), (0, [("c", 4), ("w", 2)], [("d", 4)])
    last = (100, [("d", 4)], [("e", 4)])
    assert list(fuse_kernels([product, first, second, last])) == [
        (100, [("a", 8)], [("b", 8)]),
        (0, [("b", 8), ("w", 2)], [("d", 4)]),
        (100, [("d", 4)], []),
    ]


def test_a_kernel_takes_the_longest_of_its_bytes_its_flops_and_its_launch():
    by_bytes, by_flops = (0, [("a", 800)], []), (600, [], [])
    assert sum_seconds([by_bytes], 1.0, 1e9, 0.0) == pytest.approx(1000)
    assert sum_seconds([by_flops], 1e9, 1.0, 0.0) == pytest.approx(1000)
    assert sum_seconds([by_bytes, by_flops], 1e9, 1e9, 5.0) == 10.0


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 counts no FLOPs of attention")
def test_an_update_has_the_flops_of_its_products(monkeypatch):
    monkeypatch.setitem(roofline.SMOLLM2, "num_hidden_layers", 2)
    kernels, parameters = trace_update(roofline.SMOLLM2, tokens=2048, length=512, supervised=0.5)
    layers = parameters - 49_152 * 576
    attention = 7 * 2 * 512 / 2 * 576 * 2 / 6  # 2 products forward and 5 backward, of half of T x T, as 6 a weight
    expected = 6 * 2048 * (layers + 255 / 512 * 49_152 * 576 + attention)  # the first token is not scored
    assert sum(flops for flops, _, _ in kernels) == pytest.approx(expected, rel=1e-3)
    speeds = predict(kernels, parameters, 2048, 1e12, 1e14)
    assert speeds["compiled"] > speeds["eager"] > 0
