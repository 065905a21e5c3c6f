"""Cross-entropy of hidden states under an output head, and its gradient, without ever holding all logits.

Logits are V / H times as large as hidden states (V: vocabulary, H: hidden size): 85 times in SmolLM2. Here the logits
of one chunk of tokens exist at a time, and are turned into their part of the loss and of the gradient at once.
"""

import torch
from torch.nn import functional as F

ROWS = 512  # tokens of a chunk at least: each chunk adds a gradient of the weights, (V, H), to the sum
CHUNK = 2**25  # logits of a chunk on a CPU: enough to keep its matrix products fast; 64 MB in 16 bits
GPU_ROWS = 4096  # tokens of a chunk on a GPU at most: with these the sum takes an eighth of the product's time
LOGITS_SHARE = 1 / 16  # of a GPU's memory, for a chunk's logits
LOGIT_BYTES = 6  # of a logit in 16 bits and, for the softmax, in fp32
BLOCK = 2**20  # logits of one softmax on a CPU: they fit its caches; 4 MB in fp32


def linear_cross_entropy(hidden, head, targets, compiled=False):
    """Sum of the cross-entropy of hidden states, (N, H), under an output head, with (N,) targets.

    Matrix products run in autocast's precision; softmax, losses, and the sum of the weights' gradient in fp32 (fp64 for
    fp64). The result supports one backward pass. Compiled, softmax, losses and gradient are one kernel on a GPU.
    """
    return LinearCrossEntropy.apply(hidden, head.weight, head.bias, targets, compiled and hidden.is_cuda)


@torch.no_grad()
def loss_and_correct(hidden, head, targets):
    """The token losses, and 1 where the target is ranked first, else 0: (2, N), in fp64, without a gradient."""
    found = [hidden.new_zeros(2, 0, dtype=torch.float64)]
    for rows, logits in logits_by_chunk(*cast_for_matmul(hidden, head.weight, head.bias)):
        found += [loss_and_correct_from_logits(*block) for block in by_block(logits, targets[rows])]
    return torch.cat(found, 1)


def loss_and_correct_from_logits(logits, targets):
    """The same of logits, (n, V): (2, n), in fp64."""
    losses = F.cross_entropy(logits.to(accumulation_dtype(logits)), targets, reduction="none")
    return torch.stack([losses.double(), (logits.argmax(-1) == targets).double()])


class LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradient in the forward pass, while the logits exist; the backward pass only scales it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, compiled):
        states, matrix, shift = cast_for_matmul(hidden, weight, bias)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]  # a frozen head needs none
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        losses = hidden.new_zeros(len(hidden), dtype=accumulation_dtype(hidden))
        overwrite = compiled_softmax_gradient if compiled else logits_to_gradients
        for rows, logits in logits_by_chunk(states, matrix, shift):
            for part, target, loss in by_block(logits, targets[rows], losses[rows]):
                overwrite(part, target, loss)
            if needs_hidden:
                grad_hidden[rows] = logits @ matrix
            if needs_weight and sums_in_fp32(logits):
                torch.addmm(grad_weight, logits.T, states[rows], out_dtype=torch.float32, out=grad_weight)
            elif needs_weight:
                grad_weight += logits.T @ states[rows]
            if needs_bias:
                grad_bias += logits.sum(0, dtype=accumulation_dtype(logits))
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        return losses.sum()

    @staticmethod
    def backward(ctx, upstream):
        gradients, ctx.gradients = ctx.gradients, ()  # scaled in place, so only once
        return *(None if gradient is None else gradient.mul_(upstream) for gradient in gradients), None, None


def logits_to_gradients(logits, targets, losses):
    """Overwrite logits, (n, V), with the token losses' gradient: softmax, less 1 at the target; and losses, (n,)."""
    targets = targets[:, None]
    log_p = F.log_softmax(logits, -1, dtype=accumulation_dtype(logits))
    losses.copy_(-log_p.gather(1, targets)[:, 0])
    p = log_p.exp_()
    logits.copy_(p.scatter_(1, targets, p.gather(1, targets) - 1))


def softmax_gradient(logits, targets, losses):
    """The same in a form that compiles into one kernel; not compiled, it takes 2.6 times as long on a CPU."""
    log_p = logits.to(accumulation_dtype(logits))
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    losses.copy_(-torch.where(is_target, log_p, 0.0).sum(-1))
    logits.copy_(log_p.exp() - is_target.to(log_p.dtype))


compiled_softmax_gradient = torch.compile(softmax_gradient, dynamic=True)


def sums_in_fp32(logits):
    """True if a matrix product of these can add to an fp32 sum itself: in 16 bits on a GPU."""
    return logits.is_cuda and logits.dtype.itemsize == 2


def cast_for_matmul(hidden, weight, bias):
    """Hidden states, weights and bias in the precision of the matrix product: autocast's, or the weights'."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def accumulation_dtype(tensor):
    """The precision of softmax and sums: fp32, or fp64 for fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def logits_by_chunk(hidden, weight, bias):
    """Yield pairs of a slice of the N rows and their logits, (n, V)."""
    size = chunk_rows(len(weight), hidden.device)
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        yield rows, F.linear(hidden[rows], weight, bias)


def chunk_rows(vocabulary, device):
    """The number of tokens whose logits exist at a time."""
    if device.type == "cpu":
        return max(ROWS, CHUNK // vocabulary)
    room = LOGITS_SHARE * torch.cuda.get_device_properties(device).total_memory
    return max(ROWS, min(GPU_ROWS, int(room / LOGIT_BYTES) // vocabulary))


def by_block(logits, *others):
    """Views of blocks of logits, each with its part of the others, such as targets; on a GPU one block."""
    size = max(1, BLOCK // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return zip(*(tensor.split(size) for tensor in (logits, *others)), strict=True)
