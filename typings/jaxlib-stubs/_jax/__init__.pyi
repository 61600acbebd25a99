"""What JAX's public signatures name of its compiled half: the wheels of jaxlib leave these stubs out.

Without them every function that takes a device, and every pytree definition, is unknown to pyright.
"""

from typing import Any

from jaxlib._jax import pytree as pytree

class Client:
    platform: str
    def __getattr__(self, name: str) -> Any: ...

class Device:
    id: int
    process_index: int
    platform: str
    device_kind: str
    client: Client
    def memory_stats(self) -> dict[str, int] | None: ...
    def __getattr__(self, name: str) -> Any: ...

def __getattr__(name: str) -> Any: ...
