"""Programs that tests run in processes of their own, on simulated devices."""

import json
import os
import subprocess
import sys

import jax
import programs


def environment(devices=1, *, cache=True, optimised=False):
    """The variables of such a process, which reads and writes the compiled programs of this one.

    Without `cache` for one that is killed: JAX leaves what it was writing as it is, and reads it later.
    `optimised` for one that reads from its programs what users get.
    """
    quick = programs.as_flags(programs.QUICK) if optimised else ()
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in quick]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    found = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    shared = {name.upper(): str(getattr(jax.config, name)) for name in names}
    return found | (shared if cache else {"JAX_ENABLE_COMPILATION_CACHE": "false"})


def answer(*arguments, **options):
    """What Python prints as JSON when it is called with these arguments in such an `environment`."""
    process = subprocess.run(
        [sys.executable, *arguments],
        env=environment(**options),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)
