"""Chains spread over processes: who runs which, whether all were given the same, and what happens when one fails."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import hmac
import ipaddress
import json
import math
import os
import secrets
import socket
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

import llc_fast
from llc_fast.support.arrays import from_bytes, to_bytes
from llc_fast.support.runtime import Stop

PATIENCE = 60.0
"""Seconds without a sign of life after which a process counts as dead. Until all have joined: five times as many."""
_TICK = 0.2
"""Seconds between looks at the others."""
_PIECE = 4 * 2**20  # bytes: the store refuses values of more than 8 MiB
_TIMEOUT = timedelta(seconds=300)
_GONE = "rank 0, which holds the results, is gone: its own output says why"
_RESUMES = "With checkpoint= the same call resumes, with any number of processes"


class ProcessFailedError(RuntimeError):
    """Another process of the run failed or died; the text says which, and what is known."""


class ProcessesDifferError(ValueError):
    """The processes of a run were given different things; raised in all of them."""


class _Signed:
    """A key-value store whose values are signed, under their keys, with the secret of the run.

    Whoever does not know the secret can disturb a run, but not add a word to it: a value that is not signed counts as
    none.
    """

    def __init__(self, store: Store, secret: bytes) -> None:
        self.raw, self._key = store, hashlib.blake2b(secret, digest_size=32, person=b"llc_fast").digest()

    def _signature(self, key: str, value: bytes) -> bytes:
        name = key.encode()
        total = hashlib.blake2b(b"%d %b" % (len(name), name), key=self._key, digest_size=32)
        total.update(value)
        return total.digest()

    def set(self, key: str, value: bytes) -> None:
        self.raw.set(key, self._signature(key, value) + value)  # type: ignore[arg-type]

    def has(self, *keys: str) -> bool:
        """Whether there is something at all these keys, signed or not."""
        return bool(self.raw.check(list(keys)))

    def get(self, key: str) -> bytes | None:
        """The value; None if there is none, or if no process of the run has written it."""
        if not self.has(key):
            return None
        data = bytes(self.raw.get(key))
        return data[32:] if hmac.compare_digest(data[:32], self._signature(key, data[32:])) else None

    def count(self, key: str, more: int = 0) -> int:
        """A number that anybody may change: of what it counts, each is looked at."""
        return int(self.raw.add(key, more))


class Team:
    """The processes of a run. Chains are independent, so all they ever exchange is their results, at the end.

    Signs of life and results go through a key-value store, not through collectives: a collective with a dead process
    hangs, and one process may be done long before another. Values are JSON and arrays, signed; nothing is unpickled.

    Args:
        rank, size: this process, and how many there are.
        store: what all of them can reach; None if there is but one.
        secret: what all of them know, and nobody else.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None, secret: bytes = b"") -> None:
        self.rank, self.size = rank, size
        self._store = None if store is None else _Signed(store, secret)
        self._session, self._round = "", 0
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._problem, self._dead = "", set[int]()
        self._stops: list[Stop] = []

    def share(self, num_chains: int) -> range:
        """The chains of this process: consecutive, as evenly as they go."""
        return range(self.rank * num_chains // self.size, (self.rank + 1) * num_chains // self.size)

    # ---- while a run lasts ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While this process works the others see it live; if it fails, they learn why, at once.

        Raises:
            ProcessFailedError: not all processes have come.
            ValueError: they have different versions of this package.
        """
        if self._store is None:
            yield
            return
        with _store_errors():
            members = self._meet(self._store)
        watch = threading.Thread(target=self._watch, args=(self._store, members), daemon=True)
        watch.start()

        def unwatched(last: Callable[[], None]) -> None:
            self._ended.set()
            watch.join(2.0)
            with contextlib.suppress(Exception):
                last()

        store = self._store
        try:
            yield
        except ProcessesDifferError:  # each of the others says so itself
            unwatched(lambda: self._leave(store))
            raise
        except BaseException as error:
            failure = error
            unwatched(lambda: self._tell(store, failure))
            raise
        unwatched(lambda: self._leave(store))

    def check(self) -> None:
        """Raise ProcessFailedError if another process is known to have failed."""
        if self._problem:
            raise ProcessFailedError(self._problem)

    @contextlib.contextmanager
    def stopping(self, stop: Stop) -> Iterator[None]:
        """Set an event when another process fails, so that this one stops after the present step, with a snapshot."""
        with self._lock:
            self._stops.append(stop)
            if self._problem:
                stop.set()
        try:
            yield
        finally:
            with self._lock:
                self._stops.remove(stop)

    def _meet(self, store: _Signed) -> list[dict[str, Any]]:
        """Wait until all are here, and agree on a name for this run's keys; returns what each says of itself.

        A store may outlive processes (torchrun's does), so that it holds what earlier ones left. A name counts only
        with an answer to it that nobody could have given before.
        """
        me = {**_this_process(), "processes": self.size}
        began, seen_unsigned = time.monotonic(), math.inf
        if self.rank == 0:
            with contextlib.suppress(Exception):  # not every store can
                store.raw.delete_key("refused")
        while True:
            if self.rank == 0:
                self._session = self._session or secrets.token_hex(16)
                store.set("session", self._session.encode())  # again and again: others may write there
                answers = [store.get(f"{self._session}/answer/{r}") for r in range(1, self.size)]
                if all(answer is not None for answer in answers):
                    members = [me, *(json.loads(answer or b"") for answer in answers)]
                    store.set(f"{self._session}/start", json.dumps(members).encode())
                    break
                missing = answers.index(None) + 1
            else:
                session, missing = store.get("session"), 0
                if session is not None and session.decode() != self._session:
                    self._session = session.decode()
                    store.set(f"{self._session}/answer/{self.rank}", json.dumps(me).encode())
                start = store.get(f"{self._session}/start") if self._session else None
                if start is not None:
                    members = json.loads(start)
                    if len(members) > self.rank and members[self.rank] == me:
                        break
                if session is None and store.has("session"):
                    seen_unsigned = min(seen_unsigned, time.monotonic())
                else:
                    seen_unsigned = math.inf
                if time.monotonic() - seen_unsigned > min(PATIENCE, 5.0):
                    store.raw.set("refused", str(self.rank))
            if store.has("refused"):
                raise ProcessFailedError(
                    "the secret of rank 0 differs from that of another process, so that they can't trust each other's "
                    "results: set LLC_FAST_SECRET to the same random text in all processes"
                )
            waited = 5 * PATIENCE
            if time.monotonic() - began > waited:
                raise ProcessFailedError(
                    f"rank {missing} has not been heard of for {waited:.0f} s: it never came here, or died before. All "
                    "processes must make the same calls"
                )
            time.sleep(0.001 * (5 + secrets.randbelow(20)))  # in step with nobody
        for key, name in {"llc_fast": "the version of llc_fast", "processes": "WORLD_SIZE"}.items():
            for r, member in enumerate(members):
                if member[key] != me[key]:
                    raise ProcessesDifferError(
                        f"{name} differs between processes: it is {me[key]} on rank {self.rank}, {member[key]} on rank "
                        f"{r}. All processes must have the same"
                    )
        return members

    def _leave(self, store: _Signed) -> None:
        """The last word of a process that is done: its end is no failure. Rank 0 goes last: it may hold the store."""
        if self.rank != 0:
            store.set(f"{self._session}/left/{self.rank}", b"")
            store.count(f"{self._session}/gone", 1)
        else:
            self._outlast(store, "gone", self.size - 1)

    def _tell(self, store: _Signed, error: BaseException) -> None:
        """The last word of a process that leaves before it is done: why."""
        if self._problem == _GONE:
            return
        if not self._problem or self._dead:  # else the others have heard of it where this one has
            text = str(error)[:10_000]
            if not isinstance(error, ProcessFailedError):  # else it is not this one that failed
                text = f"rank {self.rank} failed: {type(error).__name__}: {text}"
            store.set(f"{self._session}/alarm/{self.rank}", text.encode(errors="replace"))
            store.count(f"{self._session}/alarms", 1)
        if not self._problem:  # else it has been counted
            store.count(f"{self._session}/seen", 1)
        if self.rank == 0:
            self._outlast(store, "seen", self.size - len(self._dead))

    def _outlast(self, store: _Signed, what: str, count: int) -> None:
        """Wait for so many others, but not for long: some may have died."""
        deadline = time.monotonic() + 2.0
        while store.count(f"{self._session}/{what}") < count and time.monotonic() < deadline:
            time.sleep(0.01)

    # ---- the others ----------------------------------------------------------------------------------------

    def _watch(self, store: _Signed, members: list[dict[str, Any]]) -> None:
        """In a thread: give signs of life, and look for the others' until there is a problem."""
        me = members[self.rank]
        near = [r for r, other in enumerate(members) if r != self.rank and _is_near(other, me)]
        others = set(range(self.size)) - {self.rank}
        heard: dict[int, tuple[bytes | None, float]] = {r: (None, time.monotonic()) for r in others}
        pulse, looked, before, count = 0.0, time.monotonic(), time.monotonic(), 0
        while not self._ended.wait(_TICK):
            now = time.monotonic()
            if now - before > PATIENCE / 2:  # this process was asleep, and the others maybe too
                heard = {r: (last, now) for r, (last, _) in heard.items()}
            before = now
            problem = ""
            try:
                if now - pulse >= 1.0:
                    count, pulse = count + 1, now
                    store.set(f"{self._session}/pulse/{self.rank}", str(count).encode())
                problem = self._alarm(store)
                for r in [] if problem else list(near):
                    if not _is_alive(members[r]):
                        near.remove(r)
                        if not store.has(f"{self._session}/left/{r}"):
                            self._dead.add(r)
                            words = f"rank {r} died without a word (killed, or out of memory?). {_RESUMES}"
                            problem = self._alarm(store) or words
                            break
                if not problem and now - looked >= min(PATIENCE / 20, 3.0):
                    looked = now
                    problem = self._silent(store, heard, now)
            except Exception:  # of whatever kind the store raises when its process is gone
                problem = _GONE
            if self._ended.is_set():
                return
            if problem:
                with self._lock:
                    self._problem = problem
                    for stop in self._stops:
                        stop.set()
                if problem != _GONE:
                    with contextlib.suppress(Exception):
                        store.count(f"{self._session}/seen", 1)
                return

    def _alarm(self, store: _Signed) -> str:
        """What a process that failed has said; empty if none did."""
        if store.count(f"{self._session}/alarms"):
            for r in range(self.size):
                if (said := store.get(f"{self._session}/alarm/{r}")) is not None:
                    return said.decode()
        return ""

    def _silent(self, store: _Signed, heard: dict[int, tuple[bytes | None, float]], now: float) -> str:
        """Which process has given no sign of life; the last ones are kept in `heard`."""
        for r, (last, since) in list(heard.items()):
            sign = store.get(f"{self._session}/pulse/{r}")
            if sign != last:
                heard[r] = sign, now
            elif now - since > PATIENCE:
                del heard[r]
                if not store.has(f"{self._session}/left/{r}"):
                    self._dead.add(r)
                    return (
                        f"rank {r} has not been heard of for {PATIENCE:.0f} s: it died without a word (killed, or out "
                        f"of memory?). {_RESUMES}"
                    )
        return ""

    # ---- exchange ------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks, in each of them.

        Args:
            value: what :func:`llc_fast.support.arrays.to_bytes` takes. One process gets back its own, whatever it is.

        Raises:
            ProcessFailedError: a process failed, or has not been heard of for `PATIENCE` seconds.
            TypeError: `value` is of another kind.
        """
        if self._store is None:
            return [value]
        self.check()
        self._round += 1
        mine, key = to_bytes(value), f"{self._session}/value/{self._round}"
        with _store_errors(self.check):
            self._put(self._store, f"{key}/{self.rank}", mine)
            self._wait_until(lambda: self._has(f"{key}/{r}" for r in range(self.size)))
            values, sizes = list[Any](), list[int]()
            for r in range(self.size):
                data, pieces = self._take(self._store, f"{key}/{r}", r)
                values.append(from_bytes(mine if r == self.rank else data))
                sizes.append(pieces)
            # Rank 0 may hold the store: it must not leave before everybody has read.
            read, deadline = f"{key}/read", time.monotonic() + PATIENCE
            self._store.count(read, 1)
            if self.rank == 0:
                while self._store.count(read) < self.size and not self._problem and time.monotonic() < deadline:
                    time.sleep(0.01)
                self._forget(self._store, key, sizes)
        return values

    def agree(self, identity: Mapping[str, Any]) -> None:
        """Compare what names the run in all processes.

        Raises:
            ValueError: in all processes, if anything differs; all differences are named.
            ProcessFailedError: as :meth:`gather`.
        """
        if self._store is None:
            return
        said = [json.loads(text) for text in self.gather(json.dumps(identity, default=str))]
        names = sorted({name for other in said for name in other})
        differences = []
        for name in names:
            first = said[0].get(name)
            for r, other in enumerate(said):
                if json.dumps(other.get(name), sort_keys=True) != json.dumps(first, sort_keys=True):
                    differences.append((name, f"{_short(first)} on rank 0, {_short(other.get(name))} on rank {r}"))
                    break
        if differences:
            described = "; ".join(f"{name} is {words}" for name, words in differences)
            raise ProcessesDifferError(
                f"{differences[0][0]} differs between processes: {described}. All processes must be given the same "
                "model, data and settings"
            )

    def agree_on_number(self, name: str, value: float, *, atol: float, rtol: float = 1e-4) -> None:
        """Compare a number that processors may round differently.

        Raises:
            ValueError: in all processes, if it differs by more than `atol` and by more than the share `rtol`.
            ProcessFailedError: as :meth:`gather`.
        """
        found = self.gather(float(value))
        for r, other in enumerate(found):
            same = math.isclose(other, found[0], rel_tol=rtol, abs_tol=atol) or (
                other != other and found[0] != found[0]
            )
            if not same:
                raise ProcessesDifferError(
                    f"{name} differs between processes: it is {found[0]:.6g} on rank 0, {other:.6g} on rank {r}. All "
                    "processes must be given the same model, data and loss_fn"
                )

    def _put(self, store: _Signed, key: str, data: bytes) -> None:
        pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
        for k, piece in enumerate(pieces):
            store.set(f"{key}/{k}", piece)
        store.set(key, str(len(pieces)).encode())  # last: now it is whole

    def _take(self, store: _Signed, key: str, rank: int) -> tuple[bytes, int]:
        """What :meth:`_put` was given, and the number of its pieces; of this process's own the number alone."""
        count = store.get(key)
        names = [f"{key}/{k}" for k in range(int(count or 0))]
        pieces = [] if rank == self.rank else [store.get(name) for name in names]
        if count is None or any(piece is None for piece in pieces):
            raise ProcessFailedError(
                f"what the store holds as the results of rank {rank} was not written by a process of this run: another "
                "program writes there, and nothing of it is used. Run it where others can't reach MASTER_PORT"
            )
        return b"".join(piece or b"" for piece in pieces), len(names)

    def _has(self, keys: Iterator[str]) -> bool:
        assert self._store is not None
        return self._store.has(*keys)

    def _wait_until(self, is_done: Callable[[], bool]) -> None:
        pause = 0.001
        while True:
            self.check()  # first: if there is a problem, the store may be gone
            if is_done():
                return
            time.sleep(pause)
            pause = min(1.5 * pause, 0.05)

    def _forget(self, store: _Signed, key: str, sizes: list[int]) -> None:
        """Free the memory that a round takes in the store."""
        with contextlib.suppress(Exception):  # not every store can
            for r, count in enumerate(sizes):
                for k in range(count):
                    store.raw.delete_key(f"{key}/{r}/{k}")


@contextlib.contextmanager
def _store_errors(check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Errors of the store as errors in words; `check` may know better."""
    try:
        yield
    except dist.DistError as error:
        check()
        raise ProcessFailedError(_GONE) from error


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


# ---- processes of this machine -----------------------------------------------------------------------------


def _this_process() -> dict[str, Any]:
    """What a process says of itself; no two, at no time, say the same."""
    return {
        "nonce": secrets.token_hex(16),
        "llc_fast": llc_fast.__version__,
        "machine": _machine(),
        "user": os.geteuid(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _machine() -> str | None:
    """A name of this machine, or container: of all whose processes see each other; None if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino} {socket.gethostname()}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process started; None if it is dead, be its parent aware of that or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZXx" else fields[19]


def _is_near(other: Mapping[str, Any], me: Mapping[str, Any]) -> bool:
    """Whether this process would see the other one die."""
    keys = ("machine", "user")
    known = other["started"] is not None and me["started"] is not None and me["machine"] is not None
    return bool(known and all(other[key] == me[key] for key in keys))


def _is_alive(process: Mapping[str, Any]) -> bool:
    return bool(_started(int(process["pid"])) == process["started"])


# ---- joining -----------------------------------------------------------------------------------------------

_counter = 0


def _rank_and_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1  # a scheduler's WORLD_SIZE alone says nothing


def join(distributed: bool | None) -> Team:
    """The team that this process belongs to.

    Args:
        distributed: None: all processes of torch.distributed if it is initialized, or if ``torchrun`` started more
            than one; False: this process alone; True: as None, but an error if there is nothing to join.

    Raises:
        ValueError: `distributed` is True and there is nothing to join; the address can't be used.
        ProcessFailedError: the store of the others can't be reached.
    """
    global _counter
    if distributed is False:
        return Team()
    rank, size = _rank_and_size()
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
    store, secret = _store(rank, size)
    return Team(rank, size, PrefixStore(f"llc_fast/{attempt}/{_counter}", store), secret)


@contextlib.contextmanager
def telling_early_failures(distributed: Any) -> Iterator[None]:
    """Tell the others of an error that is raised before this process joins them: of a wrong argument, say.

    Args:
        distributed: as for :func:`join`.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, ProcessFailedError) and distributed is not False and _rank_and_size()[1] > 1:
            failure = error

            def tell() -> None:
                with (
                    contextlib.suppress(BaseException),
                    join(None if distributed is None else bool(distributed)).working(),
                ):
                    raise failure

            # In a thread, and for a few seconds: who looks for the error must not wait for processes that never come.
            teller = threading.Thread(target=tell, daemon=True)
            teller.start()
            teller.join(10.0)
        raise


def _store(rank: int, size: int) -> tuple[Store, bytes]:
    """A key-value store that all processes reach, and the secret that they share; made once."""
    # A forked process has no threads to serve a store of its parent's.
    return _made(rank, size, dist.is_available() and dist.is_initialized(), os.getpid())


@functools.lru_cache(maxsize=8)
def _made(rank: int, size: int, has_group: bool, pid: int) -> tuple[Store, bytes]:
    try:
        return _store_of_group(rank, size) if has_group else _store_of_launcher(rank, size)
    except dist.DistError as error:
        raise ProcessFailedError(f"rank {rank} can't reach the store of rank 0: {error}") from error


def _store_of_launcher(rank: int, size: int) -> tuple[Store, bytes]:
    """At MASTER_ADDR and MASTER_PORT, as torchrun and others set them for every process."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    secret = _secret_of_launcher(rank, size, host)
    # torchrun's own store listens there already; then all are its clients.
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return _serve(host, port, size), secret
    return TCPStore(host, port, size, False, _TIMEOUT, wait_for_workers=False), secret


def _store_of_group(rank: int, size: int) -> tuple[Store, bytes]:
    """Where rank 0 says, through the process group of the user, which it gives the secret to as well."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    name = hashlib.blake2b(str(_machine() or secrets.token_hex(8)).encode(), digest_size=16).digest()
    mine = torch.tensor(list(name), dtype=torch.uint8, device=device)
    machines = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(machines, mine)
    is_one = all(torch.equal(other, machines[0]) for other in machines)
    message = torch.zeros(1024, dtype=torch.uint8, device=device)
    served: Store | None = None
    if rank == 0:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1" if is_one else socket.gethostname())
        if not is_one and _is_loopback(host):
            host = socket.gethostname()
        served = _serve(host, 0, size)
        secret = os.environ.get("LLC_FAST_SECRET") or secrets.token_hex(32)
        data = json.dumps([host, served.port, hashlib.sha256(secret.encode()).hexdigest()]).encode()
        message[: len(data)] = torch.tensor(list(data), dtype=torch.uint8, device=device)
    dist.broadcast(message, src=0)
    host, port, key = json.loads(bytes(message.cpu().tolist()).rstrip(b"\0"))
    store = served or TCPStore(host, port, size, False, _TIMEOUT, wait_for_workers=False)
    return store, bytes.fromhex(key)


def _serve(host: str, port: int, size: int) -> TCPStore:
    """A store of this process, that listens at this address alone and not on all of the machine's."""
    listener = _listener(host, port)
    port = int(listener.getsockname()[1])
    fd = listener.detach()  # the store closes it
    return TCPStore(host, port, size, True, _TIMEOUT, wait_for_workers=False, master_listen_fd=fd)


def _listener(host: str, port: int) -> socket.socket:
    failed: list[OSError] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"MASTER_ADDR={host!r} is the name of no machine ({error})") from None
    for family, kind, protocol, _, address in found:
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a run that has just ended
            listener.bind(address)
            listener.listen(1024)
            return listener
        except OSError as error:
            listener.close()
            failed.append(error)
    if all(error.errno == errno.EADDRNOTAVAIL for error in failed):  # an address that a network translates
        warnings.warn(
            f"MASTER_ADDR={host!r} is no address of this machine, so that the processes' store listens on all of them. "
            "Set MASTER_ADDR to an address of the machine of rank 0 to have it listen there alone",
            stacklevel=2,
        )
        listener = socket.create_server(("", port), backlog=1024)
        return listener
    raise ValueError(
        f"MASTER_PORT={port}: rank 0 can't listen at {host}:{port} ({failed[-1].strerror}). Use another port"
    )


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)
    except (OSError, ValueError):
        return False


# ---- the secret --------------------------------------------------------------------------------------------


def _secret_of_launcher(rank: int, size: int, host: str) -> bytes:
    """What the processes of a launcher know and others do not, found by each of them alone."""
    if given := os.environ.get("LLC_FAST_SECRET"):
        return given.encode()
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local == str(size) if local is not None else _is_loopback(host):  # all on this machine
        return _secret_of_user()
    if rank == 0:
        warnings.warn(
            "The processes are on several machines and share no secret, so that whoever reaches "
            f"{host}:{os.environ['MASTER_PORT']} can falsify their results. Set LLC_FAST_SECRET to the same random "
            "text in all processes, or call torch.distributed.init_process_group first",
            stacklevel=2,
        )
    parts = (os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "WORLD_SIZE"))
    return "|".join(parts).encode()


def _secret_of_user() -> bytes:
    """Random bytes in a file that this user alone can read, on this machine; made by whoever comes first.

    Raises:
        PermissionError: there can be no such file.
    """
    try:
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        place = runtime if runtime and os.access(runtime, os.W_OK | os.X_OK) else tempfile.gettempdir()
        return _secret_in(Path(place) / f"llc_fast-{os.geteuid()}")
    except OSError as error:
        raise PermissionError(
            f"the secret of the processes can't be kept in a private file ({error}): set LLC_FAST_SECRET to the same "
            "random text in all of them"
        ) from error


def _secret_in(folder: Path) -> bytes:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    _check_private(folder, os.lstat(folder), stat.S_ISDIR)
    path = folder / "secret"
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            _make_secret(path)
            continue
        with os.fdopen(descriptor, "rb") as file:
            _check_private(path, os.fstat(descriptor), stat.S_ISREG)
            return file.read()


def _make_secret(path: Path) -> None:
    """Whole from the first moment on: processes that start together all read the same."""
    partial = path.with_name(f"secret-{secrets.token_hex(8)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink()


def _check_private(path: Path, status: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    if not is_kind(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PermissionError(f"{path} is not this user's alone: remove it")


# ---- devices -----------------------------------------------------------------------------------------------


def default_device(device: torch.device) -> torch.device:
    """The device of this process: on a machine with several GPUs each process of torchrun takes its own."""
    local = os.environ.get("LOCAL_RANK")
    if device.type == "cuda" and device.index is None and local is not None:
        return torch.device("cuda", int(local) % torch.cuda.device_count())
    return device
