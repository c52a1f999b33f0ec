"""Several processes that a launcher was asked for and that are not there, or that stop each other."""

from __future__ import annotations

import os

from ..errors import MllmEfficientError

ON_CPU = "ACCELERATE_USE_CPU"
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_launch(distributed_on_cpu: bool) -> None:
    """Raises ``MllmEfficientError`` for what launchers do in silence on a CPU.

    ``accelerate launch --num_processes 2`` starts one process there, with ``--cpu`` and without (accelerate 1.15), known by an address to
    meet at and no number of processes. distributed_on_cpu: whether torchrun's processes meet through accelerate's own settings, and so
    need ``ACCELERATE_USE_CPU`` where there is no GPU.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if launched and not any(name in os.environ for name in SIZES):
        raise MllmEfficientError(
            "accelerate launch started one process, where several were asked for: on a CPU take torchrun --nproc_per_node N, "
            f"with {ON_CPU}=true"
        )
    on_cpu = os.environ.get(ON_CPU, "").lower() in ("1", "true", "yes")
    if distributed_on_cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not on_cpu:
        import torch

        if not torch.cuda.is_available():
            raise MllmEfficientError(f"several processes on a CPU need {ON_CPU}=true before torchrun")
