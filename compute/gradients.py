"""The all-reduce of gradients, each sent as soon as the backward pass has computed it, and the load of the ranks."""

import time

import torch
from torch import distributed

from compute.distributed import all_gather, all_reduce_tensor, is_sharded, world_size


class GradientAllReduce:
    """A context for `passes` backward passes, after which each gradient is its sum over all ranks.

    All ranks must send in the same order: from the last parameter to the first, about the order in which a backward
    pass computes them. A gradient that some passes do not reach is sent at the end, with those after it. A parameter
    that no pass of any rank reaches has no gradient, as in one process: AdamW leaves it and its moments as they are.
    FSDP reduces sharded gradients itself. `sync_seconds` is the time from the last pass to the end of the all-reduces;
    None where that is not known: NCCL's wait returns at once, and shards wait for each other as layers compute.
    """

    def __init__(self, model, passes):
        reduced = world_size() > 1 and not is_sharded(model)
        self.unsent = [weights for weights in model.parameters() if weights.requires_grad] if reduced else []
        self.remaining = dict.fromkeys(self.unsent, passes)  # backward passes, by parameter
        self.reached = set()  # parameters
        self.empty_pass = False  # set before a pass over an empty micro-batch, which reaches nothing that counts
        self.hooks, self.sending, self.sync_seconds = [], [], None

    def __enter__(self):
        self.hooks = [weights.register_post_accumulate_grad_hook(self.on_accumulated) for weights in self.unsent]
        return self

    def on_accumulated(self, weights):
        """The hook that runs when a backward pass has accumulated a parameter's gradient."""
        if not self.empty_pass:
            self.reached.add(weights)
        self.remaining[weights] -= 1
        if self.remaining[weights] < 0:
            raise RuntimeError("a gradient was accumulated more than `passes` times: its sum is not complete")
        while self.unsent and not self.remaining[self.unsent[-1]]:
            self.send(self.unsent.pop())

    def send(self, weights):
        if weights.grad is None:  # no token of this rank reached it; perhaps those of another one
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
        self.drop_unreached()
        if self.remaining and not any(weights.is_cuda for weights in self.remaining):
            self.sync_seconds = time.perf_counter() - began

    def drop_unreached(self):
        """Drop the gradients, all zeros, of parameters that no rank's passes have reached."""
        if self.remaining:
            reached = torch.tensor([weights in self.reached for weights in self.remaining]).int()  # on the CPU: no wait
            for weights, ranks in zip(self.remaining, all_reduce_tensor(reached).tolist(), strict=True):
                if not ranks:
                    weights.grad = None


def load_balance(micro_batches, sync_seconds):
    """Metrics of how evenly a window was partitioned, by the tokens of this rank's micro-batches; none for one rank."""
    if world_size() == 1:
        return {}
    load = sum(micro_batches), micro_batches.count(0), len(micro_batches), sync_seconds
    tokens, empty, count, seconds = zip(*all_gather(load), strict=True)
    return {
        "largest_share": max(tokens) * world_size() / sum(tokens),
        "empty_share": sum(empty) / sum(count),
        **({} if sync_seconds is None else {"waiting_seconds": max(seconds)}),
    }
