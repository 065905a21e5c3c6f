"""What an update takes: its optimizer's seconds, how far it moves a few matrices, the memory at its peak.

Hooks on the optimizer measure; nothing waits for a GPU. So on a GPU the optimizer's seconds are those of starting its
kernels, and the ratios stay tensors until something else has waited.
"""

import resource
import sys
import time

import torch

from compute.sharding import whole


class StepMeter:
    """Measures the optimizer's steps from now on."""

    def __init__(self, model, optimizer):
        self.watched, self.measuring = watched(model), False
        self.seconds, self.ratios = 0.0, {}
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    @torch.no_grad()
    def before(self, *_):
        if self.measuring:
            self.copies = {name: weights.clone() for name, weights in self.watched.items()}
        self.began = time.perf_counter()

    @torch.no_grad()
    def after(self, *_):
        self.seconds = time.perf_counter() - self.began
        if self.measuring:
            self.ratios = {
                name: whole((weights - self.copies[name]).norm()) / whole(self.copies[name].norm())
                for name, weights in self.watched.items()
            }
            self.copies = {}


def watched(model):
    """The same matrix of a model's first, middle and last layer, by name: the kind that its last layer ends with."""
    embeddings = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    matrices = {
        name.removesuffix(".weight"): weights
        for name, weights in model.named_parameters()
        if weights.ndim == 2 and not any(weights is other for other in embeddings)
    }
    kind = list(matrices)[-1].rsplit(".", 1)[-1]
    alike = [name for name in matrices if name.endswith(kind)]
    chosen = dict.fromkeys((alike[0], alike[len(alike) // 2], alike[-1]))
    return {name.removeprefix("model."): matrices[name] for name in chosen}


def peak_memory(device):
    """The most memory that was in use so far, in bytes: of a GPU by tensors, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
