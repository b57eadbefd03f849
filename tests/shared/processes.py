"""Several processes that share the chains of a run, started as torchrun starts them."""

from __future__ import annotations

import socket
from pathlib import Path

from runs import Script


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


HEAD = """
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
import llc_fast.chains.processes, llc_fast.chains.run
llc_fast.chains.processes.PATIENCE = 3.0
llc_fast.chains.run.Monitor.interval = 0.01
torch.set_num_threads(1)

def weight(draw):
    return draw.params["0.weight"]

def slow(draw):
    time.sleep(0.01)
    return draw.params["0.weight"]

"""
"""What scripts begin with: a slow observable, and a result from each rank."""


def launch(tmp_path: Path, body: str, size: int, *arguments: object) -> list[tuple[int, str, str]]:
    """The script in `size` processes, started as torchrun does; exit code, output and errors of each."""
    port = free_port()
    processes = [
        Script(
            HEAD + body,
            tmp_path,
            *arguments,
            RANK=rank,
            WORLD_SIZE=size,
            LOCAL_RANK=rank,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(size)
    ]
    try:
        return [process.finish() for process in processes]
    finally:
        for process in processes:
            process.kill()


def all_well(results: list[tuple[int, str, str]]) -> None:
    for code, _, errors in results:
        assert code == 0, errors
