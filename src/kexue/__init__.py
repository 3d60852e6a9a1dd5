"""Forty methods of the Scientific Spaces articles: each one a module, a study and a page.

Importing the package imports nothing else; a subpackage is loaded when it is first used.

>>> import kexue
>>> kexue.stats.angles.RandomCosine(768).std()  # doctest: +ELLIPSIS
np.float64(0.0360...)
"""

import pkgutil as _pkgutil

import lazy_loader as _lazy

__version__ = "0.1.0"

__getattr__, __dir__, _ = _lazy.attach(
    __name__, submodules=sorted(m.name for m in _pkgutil.iter_modules(__path__) if m.ispkg)
)
__all__ = ["__version__", *_]
