"""What has to be the same in both passes of an encoder, and what it is made of."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

__all__: list[str] = []


class RandomState:
    """The state of the generators of the CPU and of some accelerators."""

    def __init__(self, accelerators: Sequence[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.type = accelerators[0].type if accelerators else None
        self.devices, self.states = get_device_states(
            *(torch.empty(0, device=device) for device in accelerators)
        )

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.type is not None:
            set_device_states(self.devices, self.states, device_type=self.type)


def accelerators(values: Iterable[Any]) -> list[torch.device]:
    devices = {value.device for value in values if isinstance(value, Tensor)}
    if torch.cuda.is_initialized():
        # A plain function may hold a model that cannot be seen from here.
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)


@contextmanager
def no_sync(reducers: Iterable[DistributedDataParallel]) -> Iterator[None]:
    with ExitStack() as stack:
        for reducer in reducers:
            stack.enter_context(reducer.no_sync())
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Backward passes take their types from the forward passes, not from the caller's region."""
    accelerator = torch.accelerator.current_accelerator()
    types = {"cpu"} | ({accelerator.type} if accelerator is not None else set())
    with ExitStack() as stack:
        for device_type in types:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def named_modules(encoder: Any) -> dict[str, nn.Module]:
    """Modules that a callable is made of, the outermost first, as far as they can be seen."""
    while isinstance(encoder, functools.partial):
        encoder = encoder.func
    encoder = getattr(encoder, "__self__", encoder)  # of a bound method
    return dict(encoder.named_modules()) if isinstance(encoder, nn.Module) else {}


def refuse_batch_norm(encoder: Any, way_out: str) -> None:
    for name, layer in named_modules(encoder).items():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            raise ValueError(
                f"{type(layer).__name__} layer {name!r} normalises each chunk by its own "
                "statistics, so that the gradient of the batch cannot be had chunk by chunk; use "
                f"a layer that leaves samples apart, or eval(){way_out}"
            )
