"""What ``gpu_check`` looks at without a model: the fused kernel, batches, and whether the host waits while tokens are chosen.

Every part takes the sizes, the device and the time by which it should be done, and gives a dict for the JSON: ``failed`` lists what is
wrong, ``not_here`` names what this device cannot show and why. Times are reported and never a reason to fail.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..compressors.base import Compressor
from ..compressors.divprune import distances, loop
from ..errors import BadSettingError
from ..tokens import CompressedTokens, VisualTokens
from .selection import at_budget, drawn_tokens, naive_loop, selection_rows

NOT_ON_CPU = "not on cpu"
Shape = tuple[int, int, int, tuple[int, int]]


class NotHere(Exception):
    """This machine cannot run a part; the message says why. No failure."""


@dataclass(frozen=True)
class Scale:
    """The sizes of a check.

    models: shapes of random weights, or folders with a config.json. keeps, batch_sizes: of the times to the first token. shapes:
    (N, D, K, grid) of choosing alone, of ``batch`` images at once. targets_ms: what similarity and selection may take at each of
    ``shapes``. backend: of torch.compile. repeats: at most; a slow machine makes fewer, and every number says how many.
    """

    models: tuple[str, ...] = ("llava-1.5-7b", "llava-1.6-7b")
    dtype: str = "bfloat16"
    method: str = "divprune"
    keeps: tuple[float, ...] = (0.5, 0.25, 0.1, 0.05)
    batch_sizes: tuple[int, ...] = (1, 8)
    text_tokens: int = 64
    new_tokens: int = 32
    repeats: int = 10
    shapes: tuple[Shape, ...] = ((576, 4096, 57, (24, 24)), (2880, 4096, 282, (48, 60)))
    targets_ms: tuple[float, ...] = (0.3, 2.0)
    batch: int = 8
    alike: tuple[str, ...] = ("scope", "visionzip", "divmerge")
    choosing: tuple[str, ...] = (
        "divprune", "divmerge", "scope", "visionzip", "fastervlm", "vispruner", "cdpruner", "prumerge_plus", "tome",
    )  # fmt: skip
    backend: str = "inductor"
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def read_scale(path: Path) -> Scale:
    """A scale from a JSON file of the fields that differ. Raises ``MllmEfficientError`` for a file that is none."""
    try:
        given = json.loads(path.read_text())
        unknown = set(given) - {f.name for f in fields(Scale)}
    except (OSError, ValueError, TypeError) as error:
        raise BadSettingError(f"--scale {path} is not a JSON file of sizes: {error}") from None
    if unknown:
        raise BadSettingError(f"--scale {path}: no size is called {', '.join(sorted(unknown))}")
    return Scale(**{name: _tuples(value) for name, value in given.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


# ------------------------------------------------------------------------------------------ the kernel


def kernel(scale: Scale, device: str, until: float) -> dict[str, Any]:
    """Whether the fused kernel picks what the loop picks, and how long similarity and selection take."""
    out: dict[str, Any] = {"equal": [], "rows": [], "failed": [], "not_here": {}}
    if not is_cuda(device):
        out["not_here"] = dict.fromkeys(("fused kernel", "targets_ms"), NOT_ON_CPU)
    for n, d, k, _ in scale.shapes:
        said = {"n": n, "d": d, "k": k} | picks_agree(_with_copies(n, d, device, scale), k)
        out["equal"].append(said)
        out["failed"] += [f"{name} is false at {n} -> {k}" for name, value in said.items() if value is False]
    for (n, d, k, _), target in zip(scale.shapes, scale.targets_ms):
        repeats = 5 * scale.repeats if time.time() < until else 1
        (row,) = selection_rows([(n, d, k)], device=device, dtype=scale.torch_dtype, repeats=repeats, seed=scale.seed)
        out["failed"] += [row["failed"]] if row["failed"] else []
        if is_cuda(device) and row["select_ms"]:
            row |= {"target_ms": target, "meets_target": row["select_ms"]["median"] < target}
        out["rows"].append(row)
    return out


def _with_copies(n: int, d: int, device: str, scale: Scale) -> Tensor:
    """(2, N, D) features; in the second image every other token is a copy of the one before, so that distances tie."""
    x = torch.randn(2, n, d, generator=torch.Generator().manual_seed(scale.seed))
    x[1, 1::2] = x[1, : n - 1 : 2][: len(x[1, 1::2])]
    return x.to(device, scale.torch_dtype)


def picks_agree(x: Tensor, k: int) -> dict[str, bool]:
    """Index for index on images (B, N, D): the loop and the textbook's, and on CUDA the fused kernel and the loop."""
    d = distances(x)
    chosen = torch.stack([loop(image.clone(), k) for image in d])
    out = {"loop_equals_naive": torch.equal(chosen, torch.stack([naive_loop(image.clone(), k) for image in d]))}
    if x.is_cuda:
        from ..compressors.math.farthest_triton import farthest_first

        out["fused_equals_loop"] = torch.equal(farthest_first(d.clone(), k), chosen)
    return out


# --------------------------------------------------------------------------------------------- batches


def batches(scale: Scale, device: str, until: float) -> dict[str, Any]:
    """Whether images that are compressed together are what each is by itself."""
    out: dict[str, Any] = {"rows": [], "failed": [], "not_here": {}}
    for n, d, k, grid in scale.shapes:
        images = [drawn_tokens(n, d, grid, device, scale.torch_dtype, scale.seed + i) for i in range(scale.batch)]
        for name in scale.alike:
            row = {"method": name, "n": n, "d": d, "k": k, "images": scale.batch} | together_and_alone(at_budget(name, k), images, k)
            out["rows"].append(row)
            if not row["same_tokens"]:
                out["failed"].append(f"{name} at {n} -> {k}: a batch of {scale.batch} keeps other tokens than one image at a time")
    return out


def together_and_alone(method: Compressor, images: list[VisualTokens], k: int) -> dict[str, Any]:
    """same_tokens: the kept ones and the groups of merged ones. same_bits: the features too; largest_difference: of their entries."""
    ks = [k] * len(images)
    together = method.compress_alike(images, ks) if method.shares_work else method.compress_all(images, ks)
    alone = [method.compress_all([image], [k])[0] for image in images]
    pairs = list(zip(together, alone))
    return {
        "shares_work": method.shares_work,
        "same_tokens": all(_same_places(a, b) for a, b in pairs),
        "same_bits": all(torch.equal(a.features, b.features) for a, b in pairs),
        "largest_difference": max((_difference(a.features, b.features) for a, b in pairs if len(a) == len(b)), default=None),
    }


def _same_places(a: CompressedTokens, b: CompressedTokens) -> bool:
    """Equal indices, places and groups; of tokens that have none, equal counts."""
    both = [(getattr(a, name), getattr(b, name)) for name in ("indices", "places", "groups")]
    return len(a) == len(b) and all((x is None and y is None) or (x is not None and y is not None and torch.equal(x, y)) for x, y in both)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


# --------------------------------------------------------------------------------------------- waiting

SYNCHRONISING = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")


def waits(scale: Scale, device: str, until: float) -> dict[str, Any]:
    """How often choosing makes the host wait for the device, by torch's profiler, and what it asks of the host, on any device."""
    out: dict[str, Any] = {"rows": [], "failed": [], "not_here": {} if is_cuda(device) else {"host_waits": NOT_ON_CPU}}
    out["meaning"] = {
        "host_waits": "synchronisations of a stream or an event, and copies to the host, in one call of the method",
        "allowed": "one: the check of the features for NaN and infinity",
        "host_reads": "operations whose result the host needs; tolist() is one on CUDA alone",
    }
    n, d, k, grid = scale.shapes[0]
    v = drawn_tokens(n, d, grid, device, scale.torch_dtype, scale.seed)
    for name in scale.choosing:
        method = at_budget(name, k)
        work = _choosing(method, v, k)
        row: dict[str, Any] = {"method": name, "n": n, "k": k, "host_reads": host_reads(work)}
        if is_cuda(device):
            row["host_waits"] = waits_of(work)
            row["meets_target"] = row["host_waits"]["synchronisations"] <= 1
        out["rows"].append(row)
    return out


def _choosing(method: Compressor, v: VisualTokens, k: int) -> Callable[[], object]:
    return lambda: method.compress_all([v], [k])


class HostReads(TorchDispatchMode):
    """Counts, by name, operations whose result the host needs before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        given = next((a for a in args if isinstance(a, Tensor)), None)
        to_host = isinstance(out, Tensor) and not out.is_cuda and given is not None and given.is_cuda
        masked = name == "index" and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        if name in READS or to_host or masked:
            self.counts[name] += 1
        return out


def host_reads(work: Callable[[], object]) -> dict[str, int]:
    """By name, and nothing where the host reads nothing."""
    with HostReads() as reads:
        work()
    return dict(reads.counts)


def waits_of(work: Callable[[], object]) -> dict[str, Any]:
    """``count_waits`` of one call on CUDA, which must have been made once before. Raises where the profiler saw nothing of CUDA."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
    return count_waits(event.name for event in seen.events())


def count_waits(names: Iterable[str]) -> dict[str, Any]:
    """synchronisations and copies_to_host among a profile's events, and how many kernels were launched."""
    counts = Counter(names)
    launches = sum(count for name, count in counts.items() if "LaunchKernel" in name)
    if not launches:
        raise RuntimeError("the profiler saw no kernel launched: it cannot count what the host waits for (is CUPTI there?)")
    return {
        "synchronisations": sum(counts[name] for name in SYNCHRONISING),
        "copies_to_host": sum(count for name, count in counts.items() if name.startswith("Memcpy DtoH")),
        "launches": launches,
    }
