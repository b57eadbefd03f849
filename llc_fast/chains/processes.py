"""Chains spread over processes: who runs which, and what happens when one of them dies."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

PATIENCE = 60.0
"""Seconds without a sign of life after which a process counts as dead."""
_PIECE = 4 * 2**20  # bytes: the store refuses values of more than 8 MiB


class ProcessFailedError(RuntimeError):
    """Another process of the run failed or died; the text says which, and what is known."""


class Team:
    """The processes of a run. Chains are independent, so all they ever exchange is their results, at the end.

    Signs of life and results go through a key-value store, not through collectives: a collective with a dead process
    hangs, and one process may be done long before another.

    Args:
        rank, size: this process, and how many there are.
        store: what all of them can reach; None if there is but one.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._ended, self._round = threading.Event(), 0

    def share(self, num_chains: int) -> range:
        """The chains of this process: consecutive, as evenly as they go."""
        return range(self.rank * num_chains // self.size, (self.rank + 1) * num_chains // self.size)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While this process works the others see it live; if it fails, they learn why."""
        if self._store is None:
            yield
            return
        pulse = threading.Thread(target=self._beat, daemon=True)
        pulse.start()
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(Exception):
                self._store.set(f"failed/{self.rank}", f"{type(error).__name__}: {error}")
            raise
        finally:
            self._ended.set()

    def _beat(self) -> None:
        assert self._store is not None
        count = 0
        while not self._ended.wait(1.0):
            count += 1
            try:
                self._store.set(f"pulse/{self.rank}", str(count))
            except Exception:  # the store's own process is gone: whoever waits will notice
                return

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks, in each of them.

        Raises:
            ProcessFailedError: a process failed, or has not been heard of for `PATIENCE` seconds.
        """
        if self._store is None:
            return [value]
        self._round += 1
        try:
            self._put(f"value/{self._round}/{self.rank}", pickle.dumps(value))
            self._wait_for_all(f"value/{self._round}")
            values = [pickle.loads(self._take(f"value/{self._round}/{rank}")) for rank in range(self.size)]
            # Rank 0 may hold the store: it must not leave before everybody has read.
            read, deadline = f"read/{self._round}", time.monotonic() + PATIENCE
            self._store.add(read, 1)
            while self.rank == 0 and self._store.add(read, 0) < self.size and time.monotonic() < deadline:
                time.sleep(0.01)
        except dist.DistError as error:
            raise ProcessFailedError("rank 0, which holds the results, is gone: its own output says why") from error
        return values

    def _put(self, key: str, data: bytes) -> None:
        assert self._store is not None
        pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
        for k, piece in enumerate(pieces):
            self._store.set(f"{key}/{k}", piece)  # type: ignore[arg-type]
        self._store.set(key, str(len(pieces)))  # last: now it is whole

    def _take(self, key: str) -> bytes:
        assert self._store is not None
        return b"".join(self._store.get(f"{key}/{k}") for k in range(int(self._store.get(key))))

    def _wait_for_all(self, key: str) -> None:
        """Until every process has put its value, or one of those that have not is found to have failed."""
        assert self._store is not None
        last = dict.fromkeys(range(self.size), (b"", time.monotonic()))  # pulse, and when it was first seen
        while waiting := [rank for rank in last if not self._store.check([f"{key}/{rank}"])]:
            for rank in waiting:
                if self._store.check([f"failed/{rank}"]):
                    raise ProcessFailedError(f"rank {rank} failed: {self._store.get(f'failed/{rank}').decode()}")
                pulse, heard = last[rank]
                if self._store.check([f"pulse/{rank}"]) and (now := self._store.get(f"pulse/{rank}")) != pulse:
                    last[rank] = now, time.monotonic()
                elif time.monotonic() - heard > PATIENCE:
                    raise ProcessFailedError(
                        f"rank {rank} has not been heard of for {PATIENCE:.0f} s: it died without a word (killed, or "
                        "out of memory?). With checkpoint= the same call resumes, with any number of processes"
                    )
            time.sleep(0.05)


_counter = 0


def join(distributed: bool | None) -> Team:
    """The team that this process belongs to.

    Args:
        distributed: None: all processes of torch.distributed if it is initialized, or if ``torchrun`` started more
            than one; False: this process alone; True: as None, but an error if there is nothing to join.

    Raises:
        ValueError: `distributed` is True and there is nothing to join.
    """
    global _counter
    if distributed is False:
        return Team()
    if dist.is_available() and dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    else:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        launched = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
        if not (launched and "RANK" in os.environ):
            rank, size = 0, 1
    if size == 1:
        if distributed:
            raise ValueError(
                "distributed=True, but there is one process: start it with torchrun --nproc-per-node N, or call "
                "torch.distributed.init_process_group first"
            )
        return Team()
    _counter += 1  # every process makes the same calls in the same order
    # torchrun's store outlives the processes: those of a restart must not read what the ones before left.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Team(rank, size, PrefixStore(f"llc_fast/{attempt}/{_counter}", _store(rank, size)))


_own_store: Store | None = None


def _store(rank: int, size: int) -> Store:
    """A key-value store that all processes reach; made once."""
    global _own_store
    if _own_store is None:
        wait = timedelta(seconds=300)
        if dist.is_initialized():
            address: list[Any] = [None]
            if rank == 0:
                host = os.environ.get("MASTER_ADDR", "localhost")
                _own_store = TCPStore(host, 0, size, True, wait, wait_for_workers=False)
                address = [(host, _own_store.port)]
            dist.broadcast_object_list(address, src=0)
            if rank != 0:
                _own_store = TCPStore(address[0][0], address[0][1], size, False, wait)
        else:
            # torchrun's own store may listen at MASTER_PORT already; then all are its clients.
            serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            port = int(os.environ["MASTER_PORT"])
            _own_store = TCPStore(os.environ["MASTER_ADDR"], port, size, serves, wait, wait_for_workers=False)
    assert _own_store is not None
    return _own_store


def default_device(device: torch.device) -> torch.device:
    """The device of this process: on a machine with several GPUs each process of torchrun takes its own."""
    local = os.environ.get("LOCAL_RANK")
    if device.type == "cuda" and device.index is None and local is not None:
        return torch.device("cuda", int(local) % torch.cuda.device_count())
    return device
