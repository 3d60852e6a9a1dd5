"""Optimisers."""

import pkgutil as _pkgutil

import lazy_loader as _lazy

_NAMES = {
    "amos": [
        "Amos",
        "ScaleDecayLR",
        "amos_parameter_groups",
        "parameter_scale",
        "relative_scale_groups",
        "scale_decay",
    ],
    "zeroth_order": [
        "StepRecord",
        "ZerothOrderEstimate",
        "ZerothOrderSGD",
        "replay",
        "zeroth_order_gradient",
    ],
}

_present = {m.name for m in _pkgutil.iter_modules(__path__)}

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules=sorted(_present),
    submod_attrs={module: names for module, names in _NAMES.items() if module in _present},
)
