r"""A claim that is known not to hold in one budget.

Two is less than three, and one is not: the full budget looks further.
"""

from kexue.lab import Lab


def run(lab: Lab) -> None:
    lab.claim("number", lab.pick(smoke=3, quick=3, full=2), ">=", 3)
