"""The lab: it runs studies, keeps what they found, and writes the pages that show it.

The lab imports no method. Studies import the lab, and hand it numbers, tables and figures.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules=[
        "catalogue",
        "cli",
        "data",
        "formal_languages",
        "measures",
        "report",
        "runner",
        "sheets",
        "store",
        "study",
    ],
    submod_attrs={
        "errors": ["DataError", "LabError", "NotRun", "StoreError", "UsageError"],
        "study": ["Claim", "Lab", "seeded"],
        "data": ["Data"],
    },
)
