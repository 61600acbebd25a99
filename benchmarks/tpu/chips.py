"""Published figures of the chips."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip, in bytes, bytes a second and bf16 operations a second."""

    name: str
    memory: float
    hbm: float
    interconnect: float  # all links, one direction
    flops: float
    source: str


CHIPS = {
    # The interconnect is published for both directions together: 400 and 1200 GB/s.
    "v5e": Chip("v5e", 16 * 2**30, 819e9, 200e9, 197e12, "https://cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip("v5p", 95 * 2**30, 2765e9, 600e9, 459e12, "https://cloud.google.com/tpu/docs/v5p"),
}
