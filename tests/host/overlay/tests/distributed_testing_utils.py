"""Stand-in for the module of the same name, which the sdist lacks: gloo processes on the CPU.

The processes come from a fork server that has torch, transformers and hf_moe imported already: a test with two ranks
then starts in a fraction of a second, where fresh interpreters take ten.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

PATIENCE = 300  # seconds for one test; the longest needs 20 on two idle cores

multiprocessing.set_forkserver_preload(["hf_moe", "tests.test_fsdp_mixin", "tests.test_expert_parallel_mixin"])


def run_distributed(world_size: int = 2) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Wraps `function(rank, *args)` so that a call runs it in `world_size` processes."""

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            # the store listens before the ranks start, so that no other process can take its port
            store = dist.TCPStore("localhost", 0, world_size=None, is_master=True, wait_for_workers=False)
            _start_rank_processes(_run_rank, (world_size, store.host, store.port, function, args), world_size)

        return call

    return wrap


def _run_rank(rank: int, world_size: int, host: str, port: int, function: Callable[..., None], args: tuple) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR=host, MASTER_PORT=str(port))
    store = dist.TCPStore(host, port, world_size=None, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    except Exception:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def _start_rank_processes(function: Callable[..., None], args: tuple = (), nprocs: int = 2) -> None:
    ranks = torch.multiprocessing.start_processes(
        _run_single_threaded, args=(function, args), nprocs=nprocs, join=False, start_method="forkserver"
    )
    assert ranks is not None, "only join=True returns nothing"
    deadline = time.monotonic() + PATIENCE
    while not ranks.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"The ranks were still running after {PATIENCE} s: do they wait for each other?")


def _run_single_threaded(rank: int, function: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    function(rank, *args)


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """Nothing to do on the CPU."""
