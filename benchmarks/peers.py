"""The clips of PyTorch and TensorFlow, where they are installed."""

import importlib
import importlib.util
import os
from typing import Any

import jax
import numpy as np

from .measure import Contender


def contenders(
    tree: Any, max_norm: float, *, eager: bool = False
) -> dict[str, Contender]:
    """Those that can be imported, on the same leaves and the same kind of device.

    Args:
      tree: the updates.
      max_norm: what they are clipped to.
      eager: whether TensorFlow's is to run without ``tf.function``. PyTorch's is
        always called as users call it.
    """
    leaves = jax.tree.leaves(tree)
    found = {}
    if importlib.util.find_spec("torch"):
        found["torch"] = _torch(leaves, max_norm)
    if importlib.util.find_spec("tensorflow"):
        found["tensorflow"] = _tensorflow(leaves, max_norm, eager)
    return found


def _torch(leaves: list[jax.Array], max_norm: float) -> Contender:
    torch: Any = importlib.import_module("torch")
    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"

    def with_gradient(leaf: jax.Array) -> Any:
        wide = torch.from_numpy(np.array(leaf, np.float32))
        param = torch.nn.Parameter(wide.to(device, getattr(torch, str(leaf.dtype))))
        param.grad = param.detach().clone()
        return param

    params = list(map(with_gradient, leaves))

    def double(_: None) -> None:
        torch._foreach_mul_([param.grad for param in params], 2.0)

    def run(_: None) -> None:
        torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=True)
        if on_gpu:
            torch.cuda.synchronize()

    return Contender(run, prepare=double)


def _tensorflow(leaves: list[jax.Array], max_norm: float, eager: bool) -> Contender:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    tf: Any = importlib.import_module("tensorflow")
    tensors = [
        tf.cast(tf.constant(np.array(leaf, np.float32)), str(leaf.dtype))
        for leaf in leaves
    ]

    def clip() -> Any:
        return tf.clip_by_global_norm(tensors, max_norm)

    function = clip if eager else tf.function(clip)

    def run(_: None) -> None:
        _, norm = function()
        norm.numpy()  # Waits; on a CPU the function has returned when it is done.

    return Contender(run)
