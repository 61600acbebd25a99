"""Compile for TPU topologies that need not exist, and write the table: `python -m benchmarks.tpu`."""

import os
from importlib import metadata

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks.aot import model, programs, run
from benchmarks.aot.programs import Case
from benchmarks.tpu.table import DEFAULT_TRACE, table

CASES = [
    *(Case("orthogonalize", t, "1e9") for t in ("v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x4", "v5p:4x4x8")),
    *(Case("orthogonalize", "v5e:4x4", n, "spread") for n in ("3e5", "5e6")),
    *(Case("orthogonalize", t, "3e5", "spread") for t in ("v5e:16x16", "v5p:4x4x8")),
    *(
        Case(p, "v5e:4x4", "small", form=f, precision="default")
        for f in ("shard_map", "constrained", "auto", "explicit")
        for p in ("gradient", "product", "products", "linearized")
    ),
    *(Case("step", t, "small", precision="default") for t in ("v5e:4x4", "v5e:8x8", "v5e:16x16")),
    *(Case("product", t, "small", precision="default") for t in ("v5e:8x8", "v5e:16x16")),
    *(Case(p, t, "1e9") for t in ("v5e:8x8", "v5p:2x2x4") for p in ("step", "gradient", "product")),
    *(Case(p, "v5e:4x4", "small", precision="default") for p in DEFAULT_TRACE),
    *(Case(p, "v5e:4x4", "small", precision="default") for p in ("solve", *programs.PRODUCTS)),
    Case("step", "v5e:8x8", "1e9", precision="default"),
    Case("step", "v5e:16x16", "1e9"),
    Case("bare step", "v5p:4x8x8", "1e11", precision="default"),
    Case("bare step", "v5e:16x16", "1e9, 32k", precision="default"),
]


def pod(topology: str) -> Mesh:
    """A mesh of one axis over all chips of a topology that exists in the compiler only."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    return Mesh(np.array(devices), (model.AXIS,), axis_types=(AxisType.Auto,))


def figures(case: Case, keep: str | None = None) -> dict:
    """What the TPU compiler makes of a case."""
    return programs.figures(case, pod(case.topology), keep) | {"libtpu": metadata.version("libtpu")}


if __name__ == "__main__":
    run.main("tpu", CASES, figures, table, __doc__)
