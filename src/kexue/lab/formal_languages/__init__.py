"""Fifteen tasks on strings whose answers need every symbol, and how models fare on longer ones.

A language model on ordinary text may look good at any length by reading its neighbourhood alone.
These tasks cannot be passed that way, and their answers are known exactly at every length. They
come in three levels of the Chomsky hierarchy:

    regular                      even_pairs, modular_arithmetic_simple, parity_check,
                                 cycle_navigation
    deterministic context-free   modular_arithmetic, reverse_string, solve_equation,
                                 stack_manipulation
    context-sensitive            binary_addition, binary_multiplication, compute_sqrt,
                                 duplicate_string, missing_duplicate, odds_first, bucket_sort

Answers come from exact integer arithmetic and a parser of this package. Numbers are written with
the most significant bit first, a final stack from bottom to top, and ``odds_first`` gives the
first, third, fifth, … symbol before the others. Google DeepMind's code for the same fifteen tasks
writes numbers with the least significant bit first, the stack from top to bottom, and the symbols
with even index first, against its own description of odds_first: scores compare, strings do not.
(A root of 101001, which is 41, is 110 here: the 101 that is printed in the article is 5.)

Source: Delétang et al., "Neural Networks and the Chomsky Hierarchy",
https://arxiv.org/abs/2207.02098.
"""

from kexue.lab.formal_languages.evaluation import (
    ExtrapolationResult,
    evaluate_length_extrapolation,
)
from kexue.lab.formal_languages.task import FormalLanguageTask, TaskBatch
from kexue.lab.formal_languages.tasks import TASKS

__all__ = [
    "TASKS",
    "ExtrapolationResult",
    "FormalLanguageTask",
    "TaskBatch",
    "evaluate_length_extrapolation",
]
