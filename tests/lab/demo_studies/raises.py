"""A study that raises.

It divides by zero.
"""

from kexue.lab import Lab


def run(lab: Lab) -> None:
    lab.claim("this much is recorded", 1.0, "<", 2.0)
    lab.observe("the quotient", 1 / (lab.seed - lab.seed), "<", 2.0)
