"""The time that work takes on its device, without making the CPU wait while it is handed over."""

from __future__ import annotations

import time
from typing import Any

import torch

DEVICE, HOST = "device", "host"


class Stopwatch:
    """Runs from where it is made to ``stop``. On CUDA it reads the device's own time line; elsewhere the host's clock, which on
    accelerators other than CUDA need not wait for the work. clock: ``DEVICE`` or ``HOST``."""

    def __init__(self, device: torch.device | None):
        self.clock, self.begin, self.end = HOST, time.perf_counter(), 0.0
        self.events: tuple[Any, Any] | None = None
        if device is not None and device.type == "cuda":
            self.clock, self.stream = DEVICE, torch.cuda.current_stream(device)
            self.events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[assignment]
            self.events[0].record(self.stream)  # type: ignore[index]

    def stop(self) -> Stopwatch:
        self.end = time.perf_counter()
        if self.events is not None:
            self.events[1].record(self.stream)
        return self

    def seconds(self) -> float:
        """Waits for the device if it has not come there yet."""
        if self.events is None:
            return self.end - self.begin
        self.events[1].synchronize()
        return float(self.events[0].elapsed_time(self.events[1])) / 1000
