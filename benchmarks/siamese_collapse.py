"""Teacher update and deviation against lightly, a step against the loop, cost of the metrics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from benchmarks.timing import compare, measure
from kexue.training.siamese import (
    BYOL,
    SimSiam,
    collapse_metrics,
    prediction_head,
    projection_head,
)

MOMENTUM = 0.99


def main() -> None:
    torch.manual_seed(0)
    teachers()
    step()
    metrics()


def teachers() -> None:
    try:
        from lightly.models.utils import update_momentum

        whose = "lightly"
    except ImportError:
        print("lightly is not installed (pip install lightly): its two operations stand in here")
        update_momentum, whose = two_operations, "multiply and add over parameters()"
    for count, size in ((100, 100_000), (2000, 512)):
        student = nn.Sequential(*(Vector(size) for _ in range(count)))
        model = BYOL(student, momentum=MOMENTUM)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.1)
        theirs = copy.deepcopy(model.teacher_encoder)
        # One update each, from the same start; the timing then goes on from there.
        model.update_teacher()
        update_momentum(student, theirs, MOMENTUM)
        pairs = zip(model.teacher_encoder.parameters(), theirs.parameters(), strict=True)
        difference = max((a - b).abs().max().item() for a, b in pairs)
        if not difference < 1e-6:
            raise AssertionError(f"teachers differ by {difference:.1e}")
        compare(
            f"teacher of {count} tensors of {size}, against {whose}",
            model.update_teacher,
            lambda student=student, theirs=theirs: update_momentum(student, theirs, MOMENTUM),
            agree=None,
            target=1 / 0.8,
        )


class Vector(nn.Module):
    """A parameter, and nothing to do with it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))


@torch.no_grad()
def two_operations(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    averages, latest = list(teacher.parameters()), list(student.parameters())
    torch._foreach_mul_(averages, momentum)
    torch._foreach_add_(averages, latest, alpha=1 - momentum)


def step() -> None:
    encoder = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 512))
    model = SimSiam(
        encoder, projector=projection_head(512, 512, 512), predictor=prediction_head(512, 128)
    )
    one, two = torch.randn(2, 256, 256)

    def by_hand() -> Tensor:
        z_1, z_2 = (model.projector(model.encoder(x)) for x in (one, two))
        p_1, p_2 = model.predictor(z_1), model.predictor(z_2)
        similar = cosine_similarity(p_1, z_2.detach()) + cosine_similarity(p_2, z_1.detach())
        return -similar.mean() / 2

    def trained(loss: Callable[[], Tensor]) -> Tensor:
        model.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    compare(
        "SimSiam step without the optimiser, against the loop by hand",
        lambda: trained(lambda: model(one, two).loss),
        lambda: trained(by_hand),
        agree=1e-5,
        target=1 / 1.02,
        repeats=15,
    )


def metrics() -> None:
    x = torch.randn(4096, 128)
    whole = measure(lambda: collapse_metrics(x))
    unit = nn.functional.normalize(x.double(), dim=1)
    decomposition = measure(lambda: torch.linalg.svdvals(unit - unit.mean(0)))
    allowed = 0.06 + decomposition
    verdict = "met" if whole <= allowed else "MISSED"
    print(
        f"collapse_metrics of 4096 x 128: {whole * 1e3:.1f} ms, singular values "
        f"{decomposition * 1e3:.1f} ms  target {allowed * 1e3:.1f} ms {verdict}"
    )
    against_lightly(x)


def against_lightly(x: Tensor) -> None:
    try:
        from lightly.utils.debug import std_of_l2_normalized
    except ImportError:
        return
    theirs: Any = float(std_of_l2_normalized(x)) * x.shape[1] ** 0.5
    ours = collapse_metrics(x).relative_std
    if not abs(ours - theirs) < 1e-5:
        raise AssertionError(f"relative deviations differ: {ours} and {theirs}")
    print(f"relative deviation: ours {ours:.6f}, √d times lightly's {theirs:.6f}")


if __name__ == "__main__":
    main()
