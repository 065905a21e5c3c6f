"""The start and the end of a run of several processes, which torchrun starts, watches and ends.

Every process (rank) joins the process group that torchrun's environment describes. The rank that fails first explains
why, and the others exit silently: a collective fails when a rank that takes part in it has ended. A rank that does not
exit, since it is blocked outside of Python, is killed by torchrun 30 seconds later.
"""

import contextlib
import os
import sys
from datetime import timedelta

import torch
from torch import distributed

from compute.distributed import barrier
from config import UserError, die_with_parent, explain_machine_errors, first_line, is_out_of_memory, report_error

JOIN_TIMEOUT = timedelta(minutes=5)  # until all ranks have joined
# The longest wait in a collective. Other ranks wait in one while rank 0 writes a checkpoint or generates answers.
TIMEOUT = timedelta(minutes=30)


def run_distributed(work):
    """Return the exit status of `work()` on this rank; one of several that fails exits at once. Only rank 0 prints."""
    work = explain_machine_errors("free some, or use a smaller model, --shard, or a lower --micro-batch-tokens")(work)
    if "RANK" in os.environ:
        die_with_parent()  # a killed torchrun leaves no process behind
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return work()
    store = join_process_group()
    streams, muted = (sys.stdout, sys.stderr), open(os.devnull, "w")  # noqa: SIM115  for the rest of the process
    if distributed.get_rank() > 0:
        sys.stdout = sys.stderr = muted
    try:
        status = work()
    except BaseException as error:
        sys.stdout, sys.stderr = streams if is_first_failure(store) else (muted, muted)
        lost = lost_process(error)
        status = report_error(UserError(lost) if lost else error)
        sys.stdout.flush()
        os._exit(status)  # the backends' threads may abort an interpreter that is taken down
    with contextlib.suppress(RuntimeError):  # a rank that is gone already has done its work too
        barrier()  # a rank that leaves while another one is still connected may abort
        distributed.destroy_process_group()
    return status


def join_process_group():
    """Join the process group of torchrun's environment; returns the store through which its ranks find each other."""
    environment = os.environ
    # torchrun's store is shared by all starts of the processes; addresses from an earlier start must not be read.
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and environment["GROUP_WORLD_SIZE"] != "1":
        raise UserError(
            "--max-restarts on several machines needs --rdzv-backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    try:
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # which torch does not check
            int(environment[name])
        store, rank, size = next(distributed.rendezvous("env://", timeout=JOIN_TIMEOUT))
        if shared:
            store = distributed.PrefixStore(environment.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (KeyError, ValueError, distributed.DistError) as error:
        why = f"{error} is not set" if isinstance(error, KeyError) else first_line(error)
        needed = "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        raise UserError(
            f"cannot join the other processes: {why}; start them with torchrun, or set {needed} for each"
        ) from error
    return store


def is_first_failure(store):
    """Count a failure of this rank in the store that all share; True for the first failure of all."""
    try:
        return store.add("failures", 1) == 1
    except distributed.DistError:  # the store is gone, with the machine that hosted it
        return os.environ["LOCAL_RANK"] == "0"


def lost_process(error):
    """A line that explains a collective that failed because another rank has ended; None for any other error."""
    signs = ("gloo", "NCCL", "Connection closed", "Connection reset")
    lost = isinstance(error, distributed.DistError) or any(sign in str(error) for sign in signs)
    if not lost or not distributed.is_initialized() or is_out_of_memory(error):  # NCCL's own memory, too
        return None
    return f"another process ended (torchrun's summary names it), or did not answer for {TIMEOUT.seconds // 60} minutes"
