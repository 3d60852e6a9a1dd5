"""Text from data, such as <script>alert("docstring")</script>, is shown, never run.

See <img src=x onerror=alert(1)> and [a link](javascript:alert(1)).
"""

from kexue.lab import Lab

ATTACK = "<script>alert('x')</script><img src=x onerror=alert(2)>"


def run(lab: Lab) -> None:
    import matplotlib.pyplot as plt

    lab.table(ATTACK, [{ATTACK: ATTACK, "n": 1}], caption=ATTACK)
    figure, axes = plt.subplots()
    axes.plot([0, 1])
    lab.figure("attack", figure, ATTACK)
    lab.claim(ATTACK + " $<\\script>$", 1.0, "<", 2.0)
