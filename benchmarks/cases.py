"""The cases: which steps are measured and compiled, and with which clips."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AxisType, PartitionSpec as P

import optax_globalclip
from optax_globalclip import clip_by_global_norm, skip_by_global_norm, zscore_threshold

from . import by_hand, networks
from .networks import abstract, gpt2_small, resnet50

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "AdamW": lambda: optax.adamw(1e-3),
    "SGD with momentum": lambda: optax.sgd(1e-3, momentum=0.9),
    "Lion": lambda: optax.lion(1e-4),
    "Adafactor": lambda: optax.adafactor(1e-3),
    "SGD": lambda: optax.sgd(1e-3),
}
CLIPS = ("by hand", "optax", "ours")
PEERS = CLIPS[:2]
STEPS = ("none", *CLIPS)
EVERY = (*STEPS, "z-score", "skip")
DTYPES = ("float32", "bfloat16", "float16")
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def clip(contender: str, max_norm: float = 1.0) -> optax.GradientTransformation:
    """The clip of a contender."""
    if contender == "none":
        return optax.identity()
    if contender == "z-score":
        return clip_by_global_norm(zscore_threshold())
    makers = {"by hand": by_hand, "optax": optax, "ours": optax_globalclip}
    return makers[contender].clip_by_global_norm(max_norm)


class Mesh(NamedTuple):
    """Devices, and what lies where on them.

    Attributes:
      axes: the sizes of the axes, by name.
      mode: of its axes, a key of ``MODES``.
      specs: of the parameters, a tree.
      data: of the batch, one for all leaves.
    """

    axes: dict[str, int]
    mode: str
    specs: Any
    data: P = P()


@dataclasses.dataclass(frozen=True)
class Case:
    """One step that all contenders take.

    Attributes:
      name: what it is.
      dtype: of parameters and gradients.
      params: their shapes and dtypes.
      optimizer: a key of ``OPTIMIZERS``; None if the clip is alone.
      loss_of: of parameters and ``data``; None if ``data`` are the gradients.
      data: shapes and dtypes.
      contenders: by name; "none" only where something remains without a clip.
      donate: whether the step is in place.
      mesh: None for one device.
    """

    name: str
    dtype: str
    params: Any
    optimizer: str | None = None
    loss_of: Callable[[Any, Any], jax.Array] | None = None
    data: Any = ()
    contenders: tuple[str, ...] = STEPS
    donate: bool = True
    mesh: Mesh | None = None

    def __str__(self) -> str:
        """As the progress bar shows it, and ``--cases`` selects it."""
        return f"{self.name}, {self.dtype}"

    def transformation(
        self, contender: str, max_norm: float = 1.0
    ) -> optax.GradientTransformation:
        """The contender's clip, and the optimizer if there is one."""
        if self.optimizer is None:
            return clip(contender, max_norm)
        optimizer = OPTIMIZERS[self.optimizer]()
        if contender == "skip":
            return skip_by_global_norm(optimizer, zscore_threshold())
        return optax.chain(clip(contender, max_norm), optimizer)

    def step(self, tx: optax.GradientTransformation) -> Callable:
        """The step: of parameters (of updates if the clip is alone), state, data."""

        def step(params: Any, state: Any, data: Any) -> tuple[Any, Any]:
            if self.optimizer is None:
                return tx.update(params, state)
            grads = jax.grad(self.loss_of)(params, data) if self.loss_of else data
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step

    @property
    def donated(self) -> tuple[int, ...]:
        """The arguments of the step that it may overwrite."""
        return (0, 1) if self.donate else ()


def optimizer_step(
    optimizer: str, dtype: str, contenders: tuple[str, ...] = STEPS, divisor: int = 1
) -> Case:
    """An optimizer's step for GPT-2 small: update and apply."""
    params = abstract(divided(gpt2_small(), divisor), dtype)
    name = f"added to {optimizer}"
    return Case(name, dtype, params, optimizer, data=params, contenders=contenders)


def divided(shapes: Any, divisor: int) -> Any:
    """As many leaves, but narrow ones."""
    return jax.tree.map(lambda size: max(1, size // divisor), shapes)


def training_step(
    name: str,
    dtype: str,
    contenders: tuple[str, ...] = STEPS,
    *,
    mesh: Mesh | None = None,
    width: int | None = None,
) -> Case:
    """A whole step of one of the networks: forward, backward, clip, optimizer."""
    builds = networks.ON_EIGHT if mesh else networks.NETWORKS
    network = builds[name]() if width is None else builds[name](width)
    where = f", {_name_of(mesh)}" if mesh else ""
    return Case(
        f"step of {name}{where}",
        dtype,
        abstract(network.shapes, dtype),
        network.optimizer,
        network.loss_of,
        network.data,
        contenders,
        mesh=mesh,
    )


def _name_of(mesh: Mesh) -> str:
    sharded = any(jax.tree.leaves(mesh.specs, is_leaf=lambda n: isinstance(n, P)))
    return f"{'FSDP' if sharded else 'data parallel'}, {mesh.mode}"


def alone(name: str, shapes: Any, dtype: str, *, donate: bool = True) -> Case:
    """The clip by itself."""
    params = abstract(shapes, dtype)
    return Case(name, dtype, params, contenders=CLIPS, donate=donate)


def clips_alone(dtypes: tuple[str, ...], leaves: int = 2000) -> list[Case]:
    """One large leaf, many small ones, and a model with many medium ones."""
    name = "clip alone, one leaf of 2^26"
    many = f"{leaves:,} leaves of 1,000"
    return [
        *(alone(name, (2**26,), dtype) for dtype in dtypes),
        alone(many, [(1000,)] * leaves, "float32", donate=False),
        alone("ResNet-50", resnet50(), "float32"),
    ]


# --- What is compiled.


def compiled(target: str) -> list[Case]:
    """Whole steps first, then what is measured too, then 70 billion parameters."""
    extra = {"decoder": EVERY}
    return [
        *(
            training_step(name, dtype, extra.get(name, STEPS))
            for name in networks.NETWORKS
            for dtype in DTYPES[:2]
        ),
        *(on_eight(name, mode) for name in EIGHT for mode in MODES),
        *(optimizer_step("AdamW", dtype, EVERY) for dtype in DTYPES),
        *clips_alone(DTYPES),
        *(llama(mode, rows) for mode in MODES for rows in LLAMA_ROWS.get(target, ())),
    ]


# By network: where its parameters lie. In data parallel, on every device.
EIGHT = {"decoder": "data parallel", "stacked decoder": "FSDP"}


def on_eight(name: str, mode: str) -> Case:
    """A whole step on eight devices, which share the batch."""

    def spec(path: Any, leaf: jax.ShapeDtypeStruct) -> P:
        if EIGHT[name] == "data parallel":
            return P()
        # The layers that are stacked are not split among devices, but each of them.
        return P(None, "data") if path[0].key == "blocks" else P("data")

    params = abstract(networks.ON_EIGHT[name]().shapes, "float32")
    specs = jax.tree_util.tree_map_with_path(spec, params)
    return training_step(
        name, "float32", mesh=Mesh({"data": 8}, mode, specs, P("data"))
    )


# By target: the rows of the meshes of 256 devices that 70B parameters lie on.
LLAMA_ROWS = {"h100": (32, 64, 128), "v5p": (32,)}


def llama(mode: str, rows: int, layers: int = 80) -> Case:
    """The clip by itself for Llama 70B, on 256 devices."""
    shapes, specs = networks.llama_70b(layers)
    axes = {"fsdp": rows, "model": 256 // rows}
    return Case(
        f"Llama 70B on {rows} × {256 // rows} devices, {mode}",
        "bfloat16",
        abstract(shapes, "bfloat16"),
        contenders=CLIPS,
        mesh=Mesh(axes, mode, specs),
    )


# --- What is measured.


def measured(*, quick: bool) -> list[Case]:
    """What clipping adds to a step, and takes alone."""
    if quick:
        steps = [optimizer_step("AdamW", dtype, EVERY) for dtype in DTYPES[:2]]
        return steps + clips_alone(DTYPES[:2], leaves=500)
    steps = [
        optimizer_step(name, dtype, EVERY if name == "AdamW" else STEPS)
        for dtype in DTYPES
        for name in ("AdamW", "SGD with momentum", "Lion", "Adafactor")
    ]
    return steps + clips_alone(DTYPES)


def measured_on_gpu(*, small: bool = False) -> list[Case]:
    """What a GPU is measured by in eight minutes; ``small`` to try that on a CPU."""
    size, divisor, width = (2**16, 64, 64) if small else (2**26, 1, None)
    both = DTYPES[:2]
    return [
        *(optimizer_step("AdamW", dtype, EVERY, divisor) for dtype in both),
        *(alone(f"clip alone, one leaf of {size:,}", (size,), dtype) for dtype in both),
        *(training_step("decoder", dtype, EVERY, width=width) for dtype in both),
        *(training_step("dense", dtype, width=width) for dtype in both),
    ]
