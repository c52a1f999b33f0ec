"""Methods of two checkouts beside each other, in turn within one run; each checkout in a process of its own.

    git worktree add ../before COMMIT
    python benchmarks/beside.py --before ../before --threads 2 --repeats 9 --output benchmarks/results/cpu-beside.json

Also the naive loops (``naive.py``) and the product of similarities, which both run in this checkout's process. A row's ratios are of
the same repeat. Tokens, text, attention and keys are those of ``mllm-efficient bench --selection``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
METHODS = ("cdpruner", "vispruner", "scope", "prumerge_plus", "tome", "visionzip")
SHAPES = ((576, 4096, 64), (2880, 4096, 160))


def serve(threads: int) -> None:
    """Reads ``[arm, n, d, k]`` a line and answers with milliseconds."""
    import torch

    import mllm_efficient as me
    from mllm_efficient.cli.options import import_files
    from mllm_efficient.measure.selection import product

    torch.set_num_threads(threads)
    import_files([HERE / "naive.py"])
    made: dict[tuple[int, int], me.VisualTokens] = {}
    for line in sys.stdin:
        name, n, d, k = json.loads(line)
        if (n, d) not in made:
            draw = torch.Generator().manual_seed(0)
            x, text, keys = (torch.randn(size, generator=draw) for size in ((n, d), (32, d), (n, 64)))
            made = {(n, d): me.VisualTokens(x, attention=torch.rand(n, generator=draw).softmax(0), keys=keys, text=text)}
        v = made[n, d]
        method: Any = None if name == "product" else me.build({"method": name, "tokens": k})
        begin = time.perf_counter()
        product(v.features) if method is None else method.compress_all([v], [k])
        print(1000 * (time.perf_counter() - begin), flush=True)


@contextmanager
def served(tree: Path, threads: int) -> Iterator[Any]:
    """A function (arm, shape) -> milliseconds, answered by a process that runs the code of ``tree``."""
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "beside.py"), "--serve", "--threads", str(threads)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(arm: str, shape: tuple[int, int, int]) -> float:
            process.stdin.write(json.dumps([arm, *shape]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise RuntimeError(f"{tree}: {arm} at {shape} failed: see above")
            return float(answer)

        yield ask
        process.stdin.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="the other checkout")
    parser.add_argument("--method", action="append", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--shape", action="append", help="NxDxK, repeatable; default: the two of bench --selection")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.threads)
        return
    shapes = [tuple(map(int, text.split("x"))) for text in options.shape or ()] or list(SHAPES)
    found = beside(options.before, options.method or METHODS, shapes, options.threads, options.warmup, options.repeats)
    for r in found["rows"]:
        said = [
            f"{name} {r[name]['median']:.2f}" for name in ("over_product", "before_over_product", "over_before", "over_naive") if r[name]
        ]
        print(f"{r['method']:14} {r['n']} -> {r['k']}  {r['ms']['median']:.1f} ms  {'  '.join(said)}")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


def beside(before: Path | None, methods: Any, shapes: Any, threads: int, warmup: int, repeats: int) -> dict[str, Any]:
    """Rows and meta of all methods at all shapes (N, D, K)."""
    from mllm_efficient.measure.machine import machine, versions
    from mllm_efficient.measure.timing import ORDER, Series, interleave, paired, spread

    rows, began = [], machine([])
    with served(HERE.parent, threads) as now, served(before or HERE.parent, threads) as then:
        for shape in shapes:
            arms = {"product": now} | {name: now for m in methods for name in (m, f"naive_{m}")}
            asked = {name: (ask, name) for name, ask in arms.items()} | {f"{m} before": (then, m) for m in methods if before}
            series = {name: Series(name) for name in asked}

            def turn(arm: Any, asked: Any = asked, shape: Any = shape) -> dict[str, float]:
                ask, name = asked[arm.name]
                return {"ms": ask(name, shape)}

            interleave(list(series.values()), turn, warmup=warmup, repeats=repeats)
            ms = {name: arm.values("ms") for name, arm in series.items()}
            for m in methods:
                of = {"": ms[m], "naive_": ms[f"naive_{m}"], "before_": ms.get(f"{m} before", [])}
                rows.append(
                    {"method": m, **dict(zip("ndk", shape))}
                    | {f"{which}ms": spread(values) for which, values in of.items()}
                    | {"product_ms": spread(ms["product"])}
                    | {f"{which}over_product": paired(values, ms["product"]) for which, values in of.items()}
                    | {f"over_{which[:-1]}": paired(of[""], of[which]) for which in ("naive_", "before_")}
                    | {"failed": [arm.failed for arm in series.values() if arm.failed]}
                )
    commit = _commit(before) if before else None
    return {"rows": rows, "meta": {
        "threads": threads, "warmup": warmup, "repeats": repeats, "order": f"all arms {ORDER}",
        "before": commit, "now": _commit(HERE.parent),
        "versions": versions("torch"), "machine": began, "machine_after": machine([]),
    }}  # fmt: skip


def _commit(tree: Path) -> str:
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=tree, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
