"""Gradient clipping by global norm for JAX and Optax.

>>> import jax.numpy as jnp
>>> import optax
>>> from optax_globalclip import clip_by_global_norm, metrics
>>> tx = optax.chain(clip_by_global_norm(1.0), optax.adamw(1e-3))
>>> grads, state = {"w": jnp.array([3.0, 4.0])}, tx.init({"w": jnp.zeros(2)})
>>> _, state = tx.update(grads, state, {"w": jnp.zeros(2)})
>>> print(metrics(state)["global_norm"])
5.0
"""

from ._clip import clip_updates as clip_updates
from ._metrics import metrics as metrics
from ._norm import global_norm as global_norm, leaf_norms as leaf_norms
from ._skip import (
    SkipByGlobalNormState as SkipByGlobalNormState,
    skip_by_global_norm as skip_by_global_norm,
)
from ._threshold import (
    Threshold as Threshold,
    quantile_threshold as quantile_threshold,
    zscore_threshold as zscore_threshold,
)
from ._transform import (
    ClipByGlobalNormState as ClipByGlobalNormState,
    clip_by_global_norm as clip_by_global_norm,
)

__version__ = "0.1.0"
