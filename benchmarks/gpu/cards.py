"""Cards as their compiler has them described: XLA's target configuration, from published figures.

Limits of a block, a multiprocessor and its shared memory follow from the compute capability (CUDA C++
Programming Guide, "Technical Specifications per Compute Capability"); the rest is the card's data sheet.
XLA gives no command buffer to a driver that it does not know to support them, so its version is stated.
"""

import dataclasses

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks.aot import model

TEMPLATE = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: {threads}
  core_count: {multiprocessors}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_block}
  cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {version}"
  device_address_bits: 64
  ecc_enabled: {ecc}
  name: "{name}"
  driver_version: "{driver}"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Card:
    """Published figures of one card; bytes, bytes a second, GHz."""

    name: str
    capability: str  # XLA's words
    version: str
    multiprocessors: int
    threads: int  # on a multiprocessor
    shared: int  # memory of a multiprocessor
    shared_block: int  # of it for one block
    cache: int
    memory: int
    bandwidth: int
    clock: float
    ecc: str
    source: str
    driver: str = "13.0.0"

    @property
    def config(self) -> str:
        """The target configuration that XLA reads."""
        return TEMPLATE.format(**dataclasses.asdict(self))


CARDS = {
    "h100": Card(
        name="NVIDIA H100 80GB HBM3",
        capability="major: 9 feature_extension: ACCELERATED_FEATURES",
        version="9.0a",
        multiprocessors=132,
        threads=2048,
        shared=228 << 10,
        shared_block=227 << 10,
        cache=50 << 20,
        memory=84942979072,
        bandwidth=3352320000000,
        clock=1.98,
        ecc="true",
        source="https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
    ),
    "rtx4090": Card(
        name="NVIDIA GeForce RTX 4090",
        capability="major: 8 minor: 9",
        version="8.9",
        multiprocessors=128,
        threads=1536,
        shared=100 << 10,
        shared_block=99 << 10,
        cache=72 << 20,
        memory=24 << 30,
        bandwidth=1008000000000,
        clock=2.52,
        ecc="false",
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
}


def mesh(topology: str) -> Mesh:
    """A mesh of one axis over the cards of one machine, "h100:8", that exist in the compiler only."""
    card, count = topology.split(":")
    found = topologies.get_topology_desc(
        platform="cuda", target_config=CARDS[card].config, topology=f"1x1x{count}"
    )
    return Mesh(np.array(found.devices), (model.AXIS,), axis_types=(AxisType.Auto,))
