"""Several processes on GPUs, by NCCL: as many as there are, or one that shards with itself. Skipped without a GPU."""

import pytest
import torch

from tests.test_processes import Case, assert_equal, updates

COUNT = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(not COUNT, reason="there is no GPU")


@pytest.mark.parametrize("shard", [1, COUNT], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    "case", [{}, {"tied": False, "vocabulary": 263}, {"packed": False, "own_logits": True}], ids=str
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_processes_on_gpus_give_the_updates_of_one(worker_pools, case, dtype, shard):
    alone = updates(Case(dtype, device="cuda", **case))
    for ours in worker_pools(COUNT).call(updates, Case(dtype, device="cuda", shard=shard, **case)):
        assert_equal(ours, alone)
