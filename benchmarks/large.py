"""One large image: 16,384 tokens of width 2,560 to 1,638, each method once, over the product of similarities; and the memory.

    python benchmarks/large.py --threads 2 --output benchmarks/results/cpu-large.json

Minutes, so no part of ``make bench``. Memory is the high-water mark of what is resident, over what was before: tokens are there by then.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import mllm_efficient as me
from mllm_efficient.measure.machine import machine, versions
from mllm_efficient.measure.memory import ON_LINUX, peak_memory
from mllm_efficient.measure.selection import product
from mllm_efficient.measure.timing import Clock

METHODS = ("divprune", "cdpruner", "vispruner", "scope", "prumerge_plus", "tome", "visionzip", "fastervlm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", action="append", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--size", type=int, nargs=3, default=(16384, 2560, 1638), metavar=("N", "D", "K"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    n, d, k = options.size
    draw, began, clock = torch.Generator().manual_seed(0), machine([]), Clock()
    x, text, keys = (torch.randn(size, generator=draw) for size in ((n, d), (32, d), (n, 64)))
    v = me.VisualTokens(x, attention=torch.rand(n, generator=draw).softmax(0), keys=keys, text=text)
    rows: list[dict[str, Any]] = []
    for name in options.method or METHODS:
        method: Any = me.build({"method": name, "tokens": k})
        before = clock.run(lambda: product(x))[0]
        idle = peak_memory([], lambda: None)[0]
        most, _, (ms, _) = peak_memory([], lambda method=method: clock.run(lambda: method.compress(v, k)))  # type: ignore[misc]
        base = (before + clock.run(lambda: product(x))[0]) / 2
        extra = round(most - idle) if most and idle else None
        rows.append({"method": name, "n": n, "d": d, "k": k, "ms": ms, "product_ms": base, "over_product": ms / base, "extra_mb": extra})
        print(f"{name:14} {ms / 1000:7.1f} s  {ms / base:6.2f} x the product  {extra} MB", flush=True)
    meta = {
        "threads": options.threads, "product_ms": "mean of one before and one after", "extra_mb": f"{ON_LINUX}, less that of nothing",
        "versions": versions("torch"), "machine": began, "machine_after": machine([]),
    }  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps({"rows": rows, "meta": meta}, indent=1) + "\n")


if __name__ == "__main__":
    main()
