"""Run by torchrun: zeroth-order training on several ranks, results as files in a folder.

Every rank leaves its parameters of every run, and rank 0 what went over the wire. The reference,
one process on the whole batch, is `train` with no ranks.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist

from kexue.optim import ZerothOrderSGD

STEPS = 8
DIRECTIONS = 3
BATCH = 12
COLLECTIVES = (
    "all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_object",
    "broadcast_object_list", "reduce", "reduce_scatter", "gather", "scatter", "send", "recv",
    "isend", "irecv", "all_to_all", "all_to_all_single", "barrier",
)  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    f"{parallel}-{'exact' if exact else 'in_place'}-{'pairs' if antithetic else 'current'}": {
        "parallel": parallel,
        "exact_restore": exact,
        "antithetic": antithetic,
    }
    for parallel in ("directions", "data")
    for exact in (False, True)
    for antithetic in (True, False)
}


def train(
    settings: dict[str, Any], *, rank: int = 0, world: int = 1, device: str = "cpu"
) -> nn.Module:
    """A small network; with parallel="data" a rank sees its part of the batch only."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).to(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 5, generator=generator).to(device)
    y = torch.randint(0, 3, (BATCH,), generator=generator).to(device)
    if settings["parallel"] == "data":
        part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        x, y = x[part], y[part]
    if world == 1:
        settings = {**settings, "parallel": None}
    optimizer = ZerothOrderSGD(
        model.parameters(), lr=0.02, epsilon=0.01, directions=DIRECTIONS, weight_decay=0.1,
        **settings,
    )  # fmt: skip
    for _ in range(STEPS):
        optimizer.step(lambda: nn.functional.cross_entropy(model(x).double(), y))
    return model


def device_kind() -> str:
    """GPUs where each of two ranks can have one."""
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= 2 else "cpu"


def counted(calls: list[int]) -> None:
    """Note the bytes of every collective that is called from here on."""
    for name in COLLECTIVES:
        original: Callable[..., Any] = getattr(dist, name)

        def wrapped(*args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            calls.append(sum(t.numel() * t.element_size() for t in tensors))
            return _original(*args, **kwargs)

        setattr(dist, name, wrapped)


def fail_on_one_rank(rank: int) -> tuple[nn.Module, str]:
    """Rank 1 cannot evaluate its second direction; then both go on."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = ZerothOrderSGD(
        model.parameters(), lr=0.1, epsilon=0.1, directions=4, parallel="directions"
    )
    calls = []

    def closure() -> Tensor:
        calls.append(rank)
        if rank == 1 and len(calls) == 4:
            raise RuntimeError("no answer")
        return model.weight.square().sum()

    said = ""
    for _ in range(3):
        try:
            optimizer.step(closure)
        except (RuntimeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
    return model, said


def main(folder: Path) -> None:
    cuda = device_kind() == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{rank}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(rank)
    calls: list[int] = []
    counted(calls)
    wire = {}
    for name, settings in RUNS.items():
        calls.clear()
        model = train(settings, rank=rank, world=world, device=device)
        wire[name] = list(calls)
        save_file(
            {key: value.cpu() for key, value in model.state_dict().items()},
            folder / f"{name}-{rank}.safetensors",
        )
    model, said = fail_on_one_rank(rank)
    save_file(dict(model.state_dict()), folder / f"failure-{rank}.safetensors")

    # Ranks that start from different parameters are told so where debugging is on.
    torch.manual_seed(rank)
    apart = nn.Linear(2, 2)
    try:
        ZerothOrderSGD(apart.parameters(), parallel="data").step(lambda: 0.0)
        apart_said = ""
    except ValueError as error:
        apart_said = str(error)
    report = {"wire": wire, "failure": said, "apart": apart_said, "world": world}
    (folder / f"report-{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # All is written. An interpreter that shuts down while gloo's threads still run may be aborted.
    os._exit(0)
