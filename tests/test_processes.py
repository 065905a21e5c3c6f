"""The law for several processes: whoever computes a window, the update is the same."""

import contextlib
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import get_node_local_rank, is_initialized
from torch.distributed.fsdp import FSDPModule

import compute.layout
import train
from compute.adapters import Lora, add_adapters
from compute.distributed import all_reduce_sum, full_tensor, is_rank0, partition_by_tokens, rank, world_size
from compute.gradients import GradientAllReduce, load_balance
from compute.layers import checkpoint_activations, compile_layers, compiled_graphs
from compute.self_check import choose_layout, use_layout
from config import Config, UserError
from conversations.masking import IGNORE, Example
from eval import evaluate
from model import Precision, broadcast_sharded, has_expected_tying, token_loss
from running.checkpoint import gather_state
from tests.conftest import layout_of, tiny_llama
from tests.faults.harness import some
from tests.mixture import tiny_mixture
from tests.parity import GradientFloor, flat_difference, flatten
from tests.worker_pool import WorkerPool

CPU = torch.device("cpu")
RATE = 1e-3
LENGTHS = (3, 40, 7, 19, 2, 64, 11, 28, 33, 5, 17)


@dataclass(frozen=True)
class Case:
    """A model and how its windows are computed."""

    dtype: str = "float64"
    precision: str = "fp32"
    packed: bool = True
    budget: int = 64  # tokens of a micro-batch
    tied: bool = True
    own_logits: bool = False
    vocabulary: int = 259
    checkpointing: bool = False
    compiled: bool = False
    breakage: str = ""
    unevaluated: bool = False
    shard: int = 1
    device: str = "cpu"
    rank: int = 0  # of adapters; 0: all weights are trained


def examples(vocabulary):
    """Examples of very different lengths; one is supervised from its first token, one not at all."""
    generator = torch.Generator().manual_seed(1)
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[: number * length // 12] = IGNORE
        yield Example(ids, torch.full_like(ids, IGNORE) if number == 3 else labels)


def windows(vocabulary):
    """Windows of all examples, of a few, of one: with more processes than conversations, too."""
    every = list(examples(vocabulary))
    return every[:8], every[8:], every[5:6], every[2:5], every[4:5], every


def divided(model, count, device=CPU, precision="fp32"):
    """A model whose weights the ranks share."""
    return broadcast_sharded(model if rank() == 0 else None, count, Precision(precision, device))


def updates(case):
    """A few updates and evaluations: numbers of both, last weights, `GradientFloor`, how many graphs were compiled."""
    device = torch.device(case.device, get_node_local_rank(0) if case.device == "cuda" else None)
    if case.device == "cuda":
        torch.cuda.set_device(device)
    model = tiny_llama(case.vocabulary, tie_word_embeddings=case.tied).to(getattr(torch, case.dtype))
    if case.rank:
        add_adapters(model, Lora(case.rank, 8), Precision(case.precision, device).dtype)
    if is_initialized() and (case.shard > 1 or case.shard == world_size()):
        model = divided(model, case.shard, device, case.precision)
    model.to(device).train()
    layout, precision = layout_of(case.packed, case.budget, case.own_logits), Precision(case.precision, device)
    use_layout(model, layout)
    if case.compiled:
        compile_layers(model)
    if case.checkpointing:
        checkpoint_activations(model)
    optimizer, numbers, evaluations = train.make_optimizer(model, weight_decay=0.1), [], []
    settings = {"precision": precision, "scaler": precision.grad_scaler(), "max_grad_norm": 0.5}
    alone = contextlib.nullcontext(SimpleNamespace(values=None)) if is_initialized() else GradientFloor(model)
    with pytest.MonkeyPatch.context() as patch, alone as floor:
        BREAKAGES.get(case.breakage, lambda _: None)(patch)
        for window in windows(case.vocabulary):
            numbers.append(
                train.train_step(model, optimizer, list(layout.local_micro_batches(window)), RATE, **settings)
            )
            if not case.unevaluated:
                evaluations.append(evaluate(model, window, layout, precision).report())
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return numbers, evaluations, flatten(model.parameters()), floor.values, compiled_graphs()


def assert_equal(ours, alone):
    """Assert that the updates of one of several ranks are those of a process alone."""
    (numbers, evaluations, weights, *_), (numbers_alone, evaluations_alone, weights_alone, floor, _) = ours, alone
    relative = 1e-12 if weights.dtype == torch.float64 else 1e-5
    for update, update_alone in zip(numbers, numbers_alone, strict=True):
        assert update.keys() - {"largest_share", "empty_share", "waiting_seconds"} == update_alone.keys()
        for name in ("lr", "tokens", "supervised_tokens"):
            assert update[name] == update_alone[name]
        assert update["loss"] == pytest.approx(update_alone["loss"], rel=relative)
        assert update["grad_norm"] == pytest.approx(update_alone["grad_norm"], rel=relative)
    for evaluation, evaluation_alone in zip(evaluations, evaluations_alone, strict=True):
        assert evaluation["supervised_tokens"] == evaluation_alone["supervised_tokens"]
        assert evaluation["loss"] == pytest.approx(evaluation_alone["loss"], rel=relative)
        assert evaluation["accuracy"] == evaluation_alone["accuracy"]
    if weights.dtype == torch.float64:
        assert flat_difference(weights, weights_alone) <= 1e-12
    else:
        assert flat_difference(weights, weights_alone, floor, RATE * len(numbers)) <= 1e-4


# Each with a number of ranks that have copies of the weights, and with ranks that shard them: four have two copies.
CASES = {
    "packed": (Case(), 3, (3, 3)),
    "fp32": (Case(dtype="float32"), 2, (4, 2)),
    "padded": (Case(packed=False, budget=130), 3, (2, 2)),
    "one conversation at a time": (Case(budget=1), 2, (3, 3)),
    "untied, a vocabulary that divides by nothing": (Case(tied=False, vocabulary=263), 2, (3, 3)),
    "own logits": (Case(packed=False, own_logits=True), 3, (2, 2)),
    "own logits, untied": (Case(packed=False, own_logits=True, tied=False), 2, (4, 2)),
    "recomputed activations": (Case(checkpointing=True), 3, (4, 2)),
    "adapters": (Case(rank=4), 3, (3, 3)),
    "adapters, recomputed, untied": (Case(rank=4, checkpointing=True, tied=False), 2, (4, 2)),
    "adapters, own logits": (Case(rank=4, packed=False, own_logits=True), 2, (2, 2)),
    "fp32, recomputed, untied, three": (Case(dtype="float32", checkpointing=True, tied=False), 3, (3, 3)),
    "fp32, recomputed, untied": (Case(dtype="float32", checkpointing=True, tied=False), 2, (2, 2)),
}


@pytest.mark.parametrize(("case", "size", "sharded"), some(CASES.values(), fast=len(CASES) - 1), ids=CASES)
def test_any_number_of_ranks_gives_the_same_updates(worker_pools, case, size, sharded):
    alone = updates(case)
    everyone = worker_pools(size).call(updates, case)
    for ours in everyone:
        assert_equal(ours, alone)
        assert torch.equal(ours[2], everyone[0][2])  # copies of the weights do not drift apart
    sharded_size, count = sharded
    for ours in worker_pools(sharded_size).call(updates, replace(case, shard=count)):
        assert_equal(ours, alone)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_compiled_layers_give_the_same_updates_in_as_many_graphs(dtype, count):
    case = Case(dtype, compiled=True, shard=count)
    with contextlib.closing(WorkerPool(2)) as pool, contextlib.closing(WorkerPool(1)) as alone:
        (one,) = alone.call(updates, replace(case, shard=0))  # one process, not sharded at all
        for ours in pool.call(updates, case):
            assert_equal(ours, one)
            assert ours[-1] == one[-1] > 0


def reshard_and_gather():
    """Check on a rank that the weights are divided, ties and buffers kept, and all of it gathered on rank 0 alone."""
    full, names = tiny_llama(263), dict(tiny_llama(263).named_parameters())
    sharded = divided(tiny_llama(263), world_size())
    every, own = (sum(weights.numel() for weights in model) for model in (names.values(), local_parts(sharded)))
    assert abs(own - every / world_size()) < 0.03 * every
    assert has_expected_tying(sharded)
    assert all(map(torch.equal, sharded.buffers(), full.buffers()))
    weights, moments = gather_state(sharded, train.make_optimizer(sharded, 0.1))
    if rank():
        assert not weights
        assert not moments
    else:
        assert weights.keys() == names.keys() == moments.keys()  # tied weights once
        for name, value in names.items():
            assert torch.equal(weights[name], value)
            assert moments[name]["exp_avg"].shape == value.shape


def local_parts(model):
    """The weights that this rank holds."""
    return [getattr(weights, "_local_tensor", weights) for weights in model.parameters()]


def test_weights_are_sharded_and_gathered(worker_pools):
    worker_pools(3).call(reshard_and_gather)


def chosen_layouts():
    """The layouts of a sharded model in fp32 and bf16, and why one is not packed that caps its logits."""
    packed = []
    for precision in (Precision("fp32", CPU), Precision("bf16", CPU)):
        model = divided(tiny_llama(259), 2, precision=precision.name)
        packed.append(choose_layout(model, token_loss, Config(), 0, precision).packed)

    def cap(_module, _inputs, output):
        output.logits = 30 * (output.logits / 30).tanh()
        return output

    model.register_forward_hook(cap)
    return packed, choose_layout(model, token_loss, Config(), 0, precision).why


def test_the_self_check_of_a_sharded_model(worker_pools):
    assert worker_pools(2).call(chosen_layouts) == [([True, True], "its output head is more than a matrix product")] * 2


# --- weights that not every window reaches


def updates_of_mixture(case, experts=6, frozen=()):
    """Weights and AdamW's state by parameter, on the CPU, after a few updates of a model that windows reach in part."""
    model = tiny_mixture(case.vocabulary, separate_experts=experts).to(getattr(torch, case.dtype))
    model = divided(model, case.shard) if case.shard > 1 else model
    layout, precision = layout_of(case.packed, case.budget), Precision(case.precision, CPU)
    use_layout(model.train(), layout)
    if case.checkpointing:
        checkpoint_activations(model)
    for name, weights in model.named_parameters():
        weights.requires_grad_(not name.startswith(tuple(frozen)) or not frozen)
    optimizer, numbers = train.make_optimizer(model, weight_decay=0.5), []
    settings = {"precision": precision, "scaler": precision.grad_scaler(), "max_grad_norm": 0.5}
    for window in windows(case.vocabulary):
        micro_batches = list(layout.local_micro_batches(window))
        while not (metrics := train.train_step(model, optimizer, micro_batches, RATE, **settings)):
            pass
        numbers.append((metrics["loss"], metrics["grad_norm"]))
    named = {name: weights for name, weights in model.named_parameters() if weights in optimizer.state}
    state = {
        name: {key: full_tensor(value) for key, value in optimizer.state[weights].items()}
        for name, weights in named.items()
    }
    return numbers, {name: full_tensor(each.detach()) for name, each in model.named_parameters()}, state


def assert_same_updates(ours, alone):
    (numbers, weights, state), (numbers_alone, weights_alone, state_alone) = ours, alone
    steps, steps_alone = ({name: of["step"].item() for name, of in each.items()} for each in (state, state_alone))
    assert steps == steps_alone
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(numbers, numbers_alone, **close)
    torch.testing.assert_close(weights, weights_alone, **close)
    torch.testing.assert_close(state, state_alone, **close)


REACHED_IN_PART = {
    "packed": (Case(), ()),
    "one conversation at a time": (Case(budget=1), ()),
    "rows without padding": (Case(packed=False, budget=1), ()),
    "recomputed activations": (Case(checkpointing=True), ()),
    "frozen embeddings and router": (Case(), ("model.embed_tokens", "model.layers.0.mlp.router")),
}


@pytest.mark.parametrize(("case", "frozen"), REACHED_IN_PART.values(), ids=REACHED_IN_PART)
def test_a_weight_that_no_token_reaches_is_left_alone_by_any_number_of_ranks(worker_pools, case, frozen):
    alone = updates_of_mixture(case, 6, frozen)
    steps = {name: of["step"].item() for name, of in alone[2].items()}
    assert set(steps.values()) == {5.0, 6.0}  # one of the six windows, of two tokens, reaches fewer experts
    unreached = {name for name in alone[1] if name not in steps and not name.startswith(frozen or "-")}
    assert {name.removeprefix("model.layers.0.").partition(".")[0] for name in unreached} == {"unused", "mlp"}
    initial = dict(tiny_mixture(259).double().named_parameters())
    assert all(torch.equal(alone[1][name], initial[name]) for name in unreached)
    for size in (2, 3):
        for ours in worker_pools(size).call(updates_of_mixture, case, 6, frozen):
            assert_same_updates(ours, alone)


def test_a_weight_that_no_token_reaches_is_left_alone_under_a_loss_scale(worker_pools):
    case = Case("float32", "fp16")
    steps = [{name: of["step"].item() for name, of in updates_of_mixture(case)[2].items()}]
    for ours in worker_pools(2).call(updates_of_mixture, case):
        steps.append({name: of["step"].item() for name, of in ours[2].items()})
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize(("size", "shard"), [(2, 2), (3, 3), (4, 2)])
def test_a_weight_that_takes_part_in_nothing_is_left_alone_by_shards(worker_pools, size, shard):
    alone = updates_of_mixture(Case(), 0)
    assert {f"model.layers.0.unused.{name}" for name in ("weight", "bias")} == alone[1].keys() - alone[2].keys()
    for ours in worker_pools(size).call(updates_of_mixture, Case(shard=shard), 0):
        assert_same_updates(ours, alone)


def refusal_of_shards():
    with pytest.raises(UserError) as refused:
        divided(tiny_mixture(259), 2)
    return str(refused.value)


def test_experts_that_are_modules_are_not_sharded(worker_pools):
    """FSDP reduces the gradients that a rank has: of other experts than those of another rank."""
    (line, _) = worker_pools(2).call(refusal_of_shards)
    assert line.startswith("--shard: the experts of this model are modules of their own (model.layers.0.mlp.experts)")


# --- what the tests above must notice


def mean_of_means(patch):
    """Each process divides by its own tokens, and the gradients are averaged, as DDP does it."""
    patch.setattr(train, "all_reduce_sum", lambda *own: tuple(max(1, number) for number in own))

    class Averaged(GradientAllReduce):
        def __exit__(self, *failed):
            super().__exit__(*failed)
            for weights in self.remaining:
                weights.grad /= world_size()

    patch.setattr(train, "GradientAllReduce", Averaged)


def dropped_share(patch):
    """The last process loses its last conversation."""

    def shares(every, count):
        *others, last = partition_by_tokens(every, count)
        return [*others, last[:-1]]

    patch.setattr(compute.layout, "partition_by_tokens", shares)


def counted_empty_tokens(patch):
    """The tokens that stand for nothing are supervised."""
    real = compute.layout.Layout.collate
    nothing = Example(torch.tensor([0, 0]), torch.tensor([0, 0]))
    patch.setattr(compute.layout.Layout, "collate", lambda layout, found: real(layout, found or [nothing]))


def unreduced_norm(patch):
    """Each process clips its own gradient, and then they are added."""
    real, summing = train.clip_grad_norm_, []

    class Later(GradientAllReduce):
        def __enter__(self):
            summing.append(self)
            return self

        def __exit__(self, *_):
            self.sync_seconds = 0.0

    def clip(parameters, most):
        norm = real(parameters, most)
        GradientAllReduce.__exit__(summing.pop(), None)
        return norm

    patch.setattr(train, "GradientAllReduce", Later)
    patch.setattr(train, "clip_grad_norm_", clip)


def summed_too_early(patch):
    """Each gradient is sent after the first of several backward passes."""

    class Early(GradientAllReduce):
        def __init__(self, model, passes):
            super().__init__(model, min(passes, 1))

        def on_accumulated(self, weights):
            if self.remaining[weights]:
                super().on_accumulated(weights)

    patch.setattr(train, "GradientAllReduce", Early)


BREAKAGES = {
    breakage.__name__: breakage
    for breakage in (mean_of_means, dropped_share, counted_empty_tokens, unreduced_norm, summed_too_early)
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_comparison_notices(worker_pools, breakage):
    case = Case(dtype="float32", breakage=breakage, unevaluated=True)
    alone = updates(Case(dtype="float32", unevaluated=True))
    for ours in worker_pools(2).call(updates, case):
        with pytest.raises(AssertionError):
            assert_equal(ours, alone)


# --- parts of a window


def test_parts_are_even_and_lose_nothing():
    every = [Example(torch.arange(length), torch.arange(length)) for length in (9, 1, 8, 2, 7, 3, 6, 4, 5)]
    shares = partition_by_tokens(every, 3)
    assert sorted(len(example.input_ids) for share in shares for example in share) == list(range(1, 10))
    assert [sum(len(example.input_ids) for example in share) for share in shares] == [16, 15, 14]
    assert partition_by_tokens(every[:1], 3) == [every[:1], [], []]


def count_tokens(lengths):
    """The tokens of this rank's micro-batches, and those that are computed."""
    window = [Example(torch.arange(length), torch.arange(length)) for length in lengths]
    share = list(layout_of(packed=True, tokens=10).local_micro_batches(window))
    return [batch.tokens for batch in share], [batch.inputs["input_ids"].numel() for batch in share]


def test_ranks_have_equally_many_micro_batches_and_empty_ones_count_nothing(worker_pools):
    expected = [([30, 0], [30, 2]), ([10, 10], [10, 10]), ([10, 0], [10, 2])]
    assert worker_pools(3).call(count_tokens, (30, 10, 10, 10)) == expected


def gradients_of_all(*passes):
    """The sums of three weights' gradients.

    Args:
        passes: of each process the weights that its backward passes reach, in the order in which they do.
    """
    weights = torch.nn.ParameterList(torch.zeros(()) for _ in range(3))
    with GradientAllReduce(weights, passes=len(passes[rank()])):
        for reached in passes[rank()]:
            loss = torch.ones(())
            for number in reversed(reached):  # as the last that is used is the first that a backward pass reaches
                loss = loss + (number + 1) * 10 ** rank() * weights[number] + 0 * weights[number] * loss
            loss.backward()
    return [each.grad.item() for each in weights]


def one_pass_too_many():
    """More backward passes than were announced: a gradient that was sent may not grow."""
    model = torch.nn.Linear(1, 1)
    with GradientAllReduce(model, passes=1):
        model(torch.ones(1)).backward()
        with pytest.raises(RuntimeError, match="more than `passes` times"):
            model(torch.ones(1)).backward()


def test_gradients_are_summed_in_any_order_and_whichever_passes_reach_them(worker_pools):
    pool = worker_pools(2)
    assert pool.call(gradients_of_all, [(2, 1, 0), (2, 1, 0)], [(0, 1, 2), (1, 0, 2)]) == [[22, 44, 66]] * 2
    assert pool.call(gradients_of_all, [(2, 1), (1,)], [(0, 1), (1, 0)]) == [[20, 44, 3]] * 2
    pool.call(one_pass_too_many)


def reduce_all():
    own = rank() + 1
    return all_reduce_sum(own), all_reduce_sum(own, 0.5), is_rank0(), load_balance([own] + [0] * rank(), 0.0)


def test_sums_are_over_all_and_integers_stay_exact(worker_pools):
    first, second = worker_pools(2).call(reduce_all)
    assert first[:2] == second[:2] == (3, [3.0, 1.0])
    assert type(first[0]) is int
    assert (first[2], second[2]) == (True, False)
    assert first[3] == second[3] == pytest.approx({"largest_share": 4 / 3, "empty_share": 1 / 3, "waiting_seconds": 0})


def update_with_nan(shard):
    """Check that an update whose gradient is not finite on one rank changes neither weights nor moments on this one."""
    model = tiny_llama(259, tie_word_embeddings=False)
    model = divided(model, shard) if shard > 1 else model
    optimizer, precision = train.make_optimizer(model.train(), weight_decay=0.1), Precision("fp32", CPU)
    layout, before = layout_of(True, 64, False), [weights.detach().clone() for weights in local_parts(model)]
    settings = {"precision": precision, "scaler": precision.grad_scaler(), "max_grad_norm": 0.5}
    use_layout(model, layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "token_loss", lambda *each: token_loss(*each) * (math.nan if rank() == 1 else 1.0))
        with pytest.raises(FloatingPointError):
            train.train_step(model, optimizer, list(layout.local_micro_batches(windows(259)[0])), 1e-3, **settings)
    assert all(map(torch.equal, local_parts(model), before))
    assert not any(full_tensor(value).any() for of in optimizer.state.values() for value in of.values())


@pytest.mark.parametrize("shard", [1, 2])
def test_an_update_that_is_not_finite_on_one_rank_is_applied_on_none(worker_pools, shard):
    worker_pools(2).call(update_with_nan, shard)
