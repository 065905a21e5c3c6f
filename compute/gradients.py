"""The all-reduce of gradients, each sent as soon as the backward pass has computed it."""

import time

import torch
from torch import distributed

from compute.processes import world_size
from compute.sharding import is_sharded


class GradientAllReduce:
    """A context in which `passes` backward passes run, and after which each gradient is its sum over all ranks.

        with SummedGradients(model, passes=2) as gradients:
            ...  # two backward passes (gradient accumulation)
        gradients.sync_seconds  # seconds between the end of the passes and that of the all-reduces

    All ranks must send in the same order: from the last parameter to the first, which is about the order in which a
    backward pass computes them. A gradient that has not had all passes when its turn comes, since some do not reach it,
    is sent at the end, with those after it. Sharded gradients are reduced by FSDP itself (`compute.sharding`).
    """

    def __init__(self, model, passes):
        reduced = world_size() > 1 and not is_sharded(model)
        self.unsent = [weights for weights in model.parameters() if weights.requires_grad] if reduced else []
        self.remaining = dict.fromkeys(self.unsent, passes)  # backward passes, by parameter
        self.hooks, self.sending = [], []

    def __enter__(self):
        self.hooks = [weights.register_post_accumulate_grad_hook(self.on_accumulated) for weights in self.unsent]
        return self

    def on_accumulated(self, weights):
        """The hook that runs when a backward pass has accumulated a parameter's gradient."""
        self.remaining[weights] -= 1
        if self.remaining[weights] < 0:
            raise RuntimeError("a gradient was accumulated more than `passes` times: its sum is not complete")
        while self.unsent and not self.remaining[self.unsent[-1]]:
            self.send(self.unsent.pop())

    def send(self, weights):
        if weights.grad is None:  # no token of this rank reached it
            weights.grad = torch.zeros_like(weights)
        self.sending.append(distributed.all_reduce(weights.grad, async_op=True))

    def __exit__(self, failed, *_):
        for hook in self.hooks:
            hook.remove()
        if failed:
            return
        began = time.perf_counter()
        while self.unsent:
            self.send(self.unsent.pop())
        for work in self.sending:
            work.wait()
        self.sync_seconds = time.perf_counter() - began
