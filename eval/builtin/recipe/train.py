"""Trains the embedded model from nothing, in five stages, on two CPU cores.

    python -m mllm_efficient.eval.builtin.recipe.train --output-dir OUT [--data-dir DATA] [--steps-scale 1.0]

Stages (each resumes from its last checkpoint): ``vision`` teaches the tower dense labels, ``language`` teaches the
language model on symbolic visual tokens (both at the same time, one core each), ``align`` fits the projector to the
symbolic tokens, ``joint`` trains everything with two data-parallel processes, ``relate`` goes on with each patch's row
and column as two more dense labels and with more questions of the categories that come last. OUTPUT_DIR/log.jsonl has
loss and accuracy by minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from .schedule import IMAGES, STAGES, VAL


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, help="where the drawn images are kept (default: OUTPUT_DIR/data)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies the steps of every stage")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--drop", action="store_true", help="ablation: the last stage sees 1/16 to all visual tokens")
    parser.add_argument("--init", type=Path, help="run the last stage alone, from this checkpoint")
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone, in this process")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    args.data_dir = args.data_dir or args.output_dir / "data"
    if args.stage:
        from .stages import run_stage

        run_stage(args.stage, args)
        return 0
    from .data import build

    build("train", args.images, args.data_dir)
    build("val", VAL * 5, args.data_dir)
    if args.init is None:
        wait([launch(args, "vision"), launch(args, "language")])
        wait([launch(args, "align")])
        wait([launch(args, "joint", rank, 2) for rank in range(2)])
    wait([launch(args, "relate", rank, 2) for rank in range(2)])
    return 0


def launch(args, stage: str, rank: int = 0, world: int = 1) -> subprocess.Popen:
    """One single-threaded process of a stage. Large allocations are kept (mmap churn costs a third of the time)."""
    package = __name__ if __name__ != "__main__" else __spec__.name
    command = [sys.executable, "-m", package, "--stage", stage]
    for name in ("output_dir", "data_dir", "seed", "steps_scale", "images", "init"):
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--drop"] if args.drop else []
    env = os.environ | {
        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533",
        "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000",
    }  # fmt: skip
    return subprocess.Popen(command, env=env)


def wait(processes) -> None:
    codes = [p.wait() for p in processes]
    if any(codes):
        raise SystemExit(f"a training process failed (exit codes {codes}); run the same command to resume")


if __name__ == "__main__":
    raise SystemExit(main())
