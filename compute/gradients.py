"""The sum of each gradient over all processes, sent while the backward pass still computes the others."""

import time

import torch
from torch import distributed

from compute.processes import world_size
from compute.sharding import is_sharded


class SummedGradients:
    """Makes each gradient of a model its sum over all processes, by the end of a `with`.

        with SummedGradients(model, passes=2) as gradients:
            ...  # two backward passes
        gradients.waited  # seconds, from the end of the passes to that of the sums

    All processes must send in the same order: that of the parameters from the last to the first, about as a backward
    pass comes to them. One that has not had all of its passes when its turn comes, since some do not reach it, is sent
    with those after it at the end. Weights that processes share (`compute.sharding`) sum theirs themselves.
    """

    def __init__(self, model, passes):
        nothing = world_size() == 1 or is_sharded(model)
        self.unsent = [] if nothing else [weights for weights in model.parameters() if weights.requires_grad]
        self.missing = dict.fromkeys(self.unsent, passes)
        self.hooks, self.sending = [], []

    def __enter__(self):
        self.hooks = [weights.register_post_accumulate_grad_hook(self.grown) for weights in self.unsent]
        return self

    def grown(self, weights):
        """A pass has added to the gradient of some weights."""
        self.missing[weights] -= 1
        if self.missing[weights] < 0:
            raise RuntimeError("a gradient has grown more often than there are backward passes: its sum is not whole")
        while self.unsent and not self.missing[self.unsent[-1]]:
            self.send(self.unsent.pop())

    def send(self, weights):
        if weights.grad is None:  # no token of this process reached it
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
        self.waited = time.perf_counter() - began
