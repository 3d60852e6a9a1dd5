r"""A claim that is known not to hold in one budget.

Two is less than three: the full budget looks further. A user's own data may be better.
"""

from kexue.lab import Lab


def run(lab: Lab) -> None:
    found = lab.pick(smoke=3, quick=3, full=2) if lab.data.path is None else 3
    lab.claim("number", found, ">=", 3)
