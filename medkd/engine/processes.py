"""Several training processes: started by torchrun, or by ``medkd train --devices``."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def start_processes() -> None:
    """Join the process group that torchrun's environment describes (NCCL on GPUs, gloo on CPUs); once is enough."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_device())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop_processes() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def local_device() -> torch.device:
    """This process's own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def is_main_process() -> bool:
    """Whether this process writes files and speaks."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
