"""A step of BYOL under DistributedDataParallel in two processes; rank 0 compares and writes.

Without batch norms the average of both processes' gradients is the gradient of the whole batch.
"""

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kexue.training.siamese import BYOL


def main(path: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = BYOL(nn.Linear(6, 4), predictor=nn.Linear(4, 4), momentum=0.5).double()
    whole = copy.deepcopy(model)
    x_1, x_2 = torch.randn(2, 8, 6, dtype=torch.float64)

    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    mine = slice(int(os.environ["RANK"]), None, 2)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(x_1[mine], x_2[mine]).loss.backward()
        optimizer.step()
        model.update_teacher()

    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        whole(x_1, x_2).loss.backward()
        optimizer.step()
        whole.update_teacher()

    for ours, theirs in zip(model.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    if dist.get_rank() == 0:
        Path(path).write_text("same")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
    # All is written. An interpreter that shuts down while gloo's threads still run may be aborted.
    os._exit(0)
