"""Losses that replace cross entropy and its relatives."""

import pkgutil as _pkgutil

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__, submodules=sorted(m.name for m in _pkgutil.iter_modules(__path__))
)
