from typing import Any

def step(
    rule: int,
    dtype: int,
    low: int,
    low_reference: int,
    num_segments: int,
    begin: int,
    end: int,
    num_chains: int,
    segments: int,
    scalars: tuple[float, ...],
    seed: int,
    step_index: int,
    chain: int,
    thermostat: int | None,
    wanted: int,
    sums: int | None,
    scratch: int | None,
    device_scalars: int | None,
    device_step: int | None,
    num_threads: int,
    stream: int | None,
) -> None: ...
def scratch_size(begin: int, end: int, num_chains: int) -> int: ...
def normals(
    dtype: str,
    out: int,
    begin: int,
    length: int,
    seed: int,
    step_index: int,
    chain: int,
    stream_id: int,
    stream: int | None,
) -> None: ...
def minibatch(
    out: int,
    num_samples: int,
    batch_size: int,
    num_chains: int,
    seed: int,
    step_index: int,
    chain: int,
    device_step: int | None,
    stream: int | None,
) -> None: ...
def has_products() -> bool: ...
def multiply(fields: tuple[int, ...], a: int, b: int, bias: int | None, c: int, num_threads: int) -> None: ...
def interface() -> dict[str, Any]: ...
def info() -> dict[str, object]: ...

class Program:
    def __init__(self, functions: dict[str, int]) -> None: ...
    def add_tensor(self, handle: int) -> int: ...
    def add_scalar(self, tensor: int) -> int: ...
    def add_text(self, text: str) -> int: ...
    def add_call(self, function: int, operands: list[int]) -> None: ...
    def add_dispatch(
        self,
        name: str,
        overload: str,
        arguments: list[tuple[str, Any]],
        num_results: int,
        targets: list[int | None],
    ) -> None: ...
    def add_product(self, fields: tuple[int, ...], a: int, b: int, bias: int | None, c: int) -> None: ...
    def add_stop(self) -> None: ...
    def run(self, first: int, num_threads: int) -> int: ...
