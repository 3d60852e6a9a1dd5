"""Steps of a gradient cache in any number of processes; rank 0 writes what it found to a file.

    python gradient_cache.py FILE
    torchrun --standalone --nproc-per-node 2 gradient_cache.py FILE

Every process takes its share of the same batch, so that the results must not depend on their
number. With a GPU for each process they talk over nccl, else over gloo.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from kexue.losses.contrastive import info_nce
from kexue.training.gradient_cache import GradientCache

BATCH, DIM = 20, 6
Results = dict[str, Tensor]


class Loss(nn.Module):
    """InfoNCE with a temperature that is learned: wrapped like an encoder, it is reduced too."""

    def __init__(self, gather: bool, **settings: Any) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
        self.settings = {"gather": gather, **settings}

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        return info_nce(queries, keys, temperature=self.log_temperature.exp(), **self.settings)


class Wrapper(nn.Module):
    """An encoder that holds a reducing module instead of being one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


class Processes:
    """This process among its peers, and the reductions that were counted."""

    def __init__(self) -> None:
        self.several = "RANK" in os.environ
        self.device = torch.device("cpu")
        if self.several:
            local = int(os.environ["LOCAL_RANK"])
            on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
            if on_gpus:
                self.device = torch.device("cuda", local)
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if on_gpus else "gloo")
        self.rank = dist.get_rank() if self.several else 0
        self.count = dist.get_world_size() if self.several else 1
        self.reductions: dict[nn.Module, int] = {}

    def wrap(self, module: nn.Module) -> nn.Module:
        module = module.to(self.device)
        if not self.several:
            return module
        wrapped = DistributedDataParallel(module)
        self.reductions[wrapped] = 0

        # The annotations are looked at, so they must not be strings.
        def counted(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            self.reductions[wrapped] += 1
            return allreduce_hook(None, bucket)

        wrapped.register_comm_hook(None, counted)
        return wrapped

    def share(self, batch: Tensor) -> Tensor:
        return batch.chunk(self.count)[self.rank].to(self.device)

    def mean(self, value: Tensor) -> Tensor:
        value = value.clone()
        if self.several:
            dist.all_reduce(value)
        return value / self.count


def tower(seed: int, dim: int = DIM) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(dim, 9), nn.Tanh(), nn.Linear(9, 4)).double()


def draw(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, DIM, generator=generator, dtype=torch.float64)


def run(
    processes: Processes,
    case: str,
    build: Callable[[], tuple[list[nn.Module], list[nn.Module]]],
    *,
    negatives: int = 1,
    chunk_size: Sequence[int] = (3, 4),
    **settings: Any,
) -> Results:
    """Two steps, because a reducer rebuilds its buckets after the first."""
    processes.reductions.clear()
    encoders, trained = build()
    loss = Loss(processes.several, **settings)
    wrapped_loss = processes.wrap(loss)
    cache = GradientCache(encoders, wrapped_loss, chunk_size=chunk_size)
    queries = processes.share(draw(BATCH, 0))
    keys = processes.share(draw(BATCH * negatives, 1))
    results: Results = {}
    for step in range(2):
        for module in (*trained, loss):
            module.zero_grad()
        output = cache.step(queries, keys)
        results[f"{case}/loss"] = processes.mean(output.loss)
        results[f"{case}/temperature"] = loss.log_temperature.grad.clone()
        for number, module in enumerate(trained):
            for name, parameter in module.named_parameters():
                results[f"{case}/{number}.{name}.{step}"] = parameter.grad.clone()
    counts = list(processes.reductions.values())
    results[f"reductions/{case}"] = torch.tensor(counts, dtype=torch.int64)
    return results


def main(path: str) -> None:
    processes = Processes()

    def shared() -> tuple[list[nn.Module], list[nn.Module]]:
        module = tower(0)
        wrapped = processes.wrap(module)
        return [wrapped, wrapped], [module]

    def two() -> tuple[list[nn.Module], list[nn.Module]]:
        modules = [tower(0), tower(1)]
        return [processes.wrap(module) for module in modules], modules

    def inside() -> tuple[list[nn.Module], list[nn.Module]]:
        module = tower(0)
        wrapper = Wrapper(processes.wrap(module))
        return [wrapper, wrapper], [module]

    def frozen() -> tuple[list[nn.Module], list[nn.Module]]:
        module, keys = tower(0), tower(1).requires_grad_(False)
        return [processes.wrap(module), keys.to(processes.device)], [module]

    results = {
        **run(processes, "shared", shared, symmetric=True),
        **run(processes, "two towers", two, symmetric=True),
        **run(processes, "one chunk", two, chunk_size=(50, 50)),
        **run(processes, "hard negatives", two, negatives=3),
        **run(processes, "wrapped inside", inside),
        **run(processes, "frozen keys", frozen),
    }
    if processes.rank == 0:
        save_file({name: tensor.cpu() for name, tensor in results.items()}, path)
    if processes.several:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
    # All is written. An interpreter that shuts down while gloo's threads still run may be aborted.
    os._exit(0)
