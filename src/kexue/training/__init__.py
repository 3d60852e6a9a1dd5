"""Training techniques for any model."""

import pkgutil as _pkgutil

import lazy_loader as _lazy

_NAMES = {
    "gradient_cache": [
        "GradientCache",
        "GradientCacheOutput",
        "chunked_encode",
        "info_nce",
        "label_vectors",
        "nt_xent",
        "split_batch",
    ],
    "teaforn": [
        "TeaForNOutput",
        "causal_lm_parts",
        "soft_embedding",
        "step_weights",
        "teaforn_loss",
    ],
}

_present = {m.name for m in _pkgutil.iter_modules(__path__)}

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules=sorted(_present),
    submod_attrs={module: names for module, names in _NAMES.items() if module in _present},
)
