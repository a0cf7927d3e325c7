"""The TPUs and GPUs to compile for, on a machine that has none.

``pip install 'optax_globalclip[tpu]'`` brings the TPUs' compiler (137 MB), and
``pip install 'jax[cuda12]'`` the GPUs' (5.6 GB), which needs an environment of its own.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from . import programs

# What XLA must know of an H100. Without a driver version, it takes the driver to be too
# old for control flow in CUDA graphs.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  runtime_version: "12.9.0"
  driver_version: "12.9.0"
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Without a GPU, nothing can be timed in order to choose between kernels.
_CUDA_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

# How libtpu learns that it need not ask for a TPU, nor be the machine's only user.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """An accelerator to compile for.

    Attributes:
      name: as on the command line.
      title: as in a figure.
      platform: as JAX names it, "tpu" or "cuda".
      compiler: the module that holds its compiler.
      install: the command that installs it.
      topologies: the name of the smallest one with so many devices.
    """

    name: str
    title: str
    platform: str
    compiler: str
    install: str
    topologies: dict[int, str]

    @property
    def is_available(self) -> bool:
        """Whether its compiler is installed."""
        return importlib.util.find_spec(self.compiler) is not None

    def devices(self, count: int = 1) -> Sequence[Any]:
        """As many devices, which need not exist."""
        return _devices(self.platform, self.topologies[count])[:count]

    def mesh(self, shape: tuple[int, ...], names: tuple[str, ...], types: Any) -> Mesh:
        """A mesh of such devices, with axes of one or of several types."""
        devices = self.devices(math.prod(shape))
        return jax.make_mesh(shape, names, types, devices=devices)

    def place(self, tree: Any) -> Any:
        """The shapes and dtypes of a tree's leaves, on one device."""
        on_one = SingleDeviceSharding(self.devices()[0])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_one),
            tree,
        )

    def compile(
        self,
        function: Callable,
        *args: Any,
        donate: tuple[int, ...] = (),
        out_shardings: Any = None,
    ) -> "Compiled":
        """Compiles for arguments placed on this target, with no cache."""
        jax.clear_caches()
        # Of the processor, so that what else the machine does changes it little.
        start = time.process_time()
        jitted = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings)
        traced = jitted.trace(*args)
        lowered = traced.lower(lowering_platforms=(self.platform,))
        options = _CUDA_OPTIONS if self.platform == "cuda" else {}
        executable = lowered.compile(compiler_options=dict(options))
        seconds = time.process_time() - start
        memory = executable.memory_analysis()
        assert memory is not None
        program = programs.parse(executable.as_text() or "")
        return Compiled(program, memory.temp_size_in_bytes, seconds)


class Compiled(NamedTuple):
    """What compiling gave.

    Attributes:
      program: what is in the compiled code.
      temporary_bytes: the memory beside arguments and results.
      build_seconds: the processor time that tracing, lowering and compiling took.
    """

    program: programs.Program
    temporary_bytes: int
    build_seconds: float


def _tpu(name: str, *topologies: str) -> Target:
    topology: dict[int, str] = dict(zip((1, 8, 256), topologies, strict=True))
    install = "pip install -e '.[tpu]'"
    return Target(name, f"TPU {name}", "tpu", "libtpu", install, topology)


TARGETS = {
    target.name: target
    for target in (
        _tpu("v5e", "v5e:2x2", "v5e:2x4", "v5e:16x16"),
        _tpu("v5p", "v5p:2x2x1", "v5p:2x2x2", "v5p:8x8x4"),
        _tpu("v6e", "v6e:2x2", "v6e:2x4", "v6e:16x16"),
        Target(
            "h100",
            "H100",
            "cuda",
            "jax_cuda12_plugin",
            "pip install 'jax[cuda12]'",
            {1: "1x1x1", 8: "1x1x8", 256: "1x32x8"},
        ),
    )
}


def available() -> dict[str, Target]:
    """The targets whose compilers are installed, by name."""
    return {name: each for name, each in TARGETS.items() if each.is_available}


@functools.cache
def _devices(platform: str, topology: str) -> Sequence[Any]:
    if platform == "cuda":
        described = topologies.get_topology_desc(
            "", platform, topology=topology, target_config=_H100
        )
    else:
        for name, value in _TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        described = topologies.get_topology_desc(topology, platform)
    return described.devices
