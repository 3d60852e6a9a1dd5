"""A claim that is known not to hold.

Two is less than three.
"""

from kexue.lab import Lab


def run(lab: Lab) -> None:
    lab.claim("two is more than three", 2.0, ">", 3.0)
    lab.claim("two is less than three", 2.0, "<", 3.0)
