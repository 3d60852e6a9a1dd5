"""A study that lacks something.

It needs a machine that nobody has.
"""

from kexue.lab import Lab, NotRun


def run(lab: Lab) -> None:
    raise NotRun("this study needs a perpetual motion machine: none was found")
