"""Finds the patch of ``corruptions``: the texture to which the class token of the embedded tower attends most.

    python -m mllm_efficient.eval.builtin.attracting [--steps 240] [--seed 0]

A tile of 4 x 4 cells in ten colours, repeated over the patch, is searched by hill climbing: one cell or two change at a time, and the
change stays if the share of attention on the patch's tokens grows, on average over validation pictures, each with the patch at a place of
its own. Attention is what ``fastervlm`` ranks by. Prints the tile and its share; ``corruptions.TILE`` is what it printed last.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from mllm_efficient.errors import run_as_command

from .corruptions import PALETTE, PLACES, TILE, patched, stream
from .regions import cells_over
from .scenes import make_scene

SIZE, PICTURES, RESTARTS = 144, 12, 4
AREA = 1 / PLACES**2


def shares(split: str = "val") -> Callable[[str], float]:
    """What measures a tile: the share of attention on it, on average over pictures of a split."""
    import torch
    from PIL import Image

    from mllm_efficient.apply.encode import encode_items
    from mllm_efficient.loading.models import ModelOptions, load, require_supported
    from mllm_efficient.registry import build

    loaded = load(ModelOptions())
    adapter, method = require_supported(loaded), build("fastervlm:keep=0.25")
    scenes = [make_scene(split, i).draw(SIZE) for i in range(PICTURES)]
    places = [stream(f"attracting/{i}").below(PLACES * PLACES) for i in range(PICTURES)]
    prompt = loaded.prompt("What colour is the big object?", 1, 0)

    def share(tile: str) -> float:
        pictures = [Image.fromarray(patched(scene, place, tile)) for scene, place in zip(scenes, places)]
        items = adapter.items(loaded.inputs([prompt] * PICTURES, [[p] for p in pictures]))
        with torch.no_grad():
            encodings = encode_items(adapter, method, items).encodings
        out = []
        for item, encoding, place in zip(items, encodings, places):
            top, left = (at / PLACES for at in divmod(place, PLACES))
            (plane,) = item.shape.planes
            inside = cells_over(plane, [(top, left, top + 1 / PLACES, left + 1 / PLACES)]).ravel()
            attention = encoding.attention.float().numpy()
            out.append(attention[inside].sum() / attention.sum())
        return float(np.mean(out))

    return share


def climb(share: Callable[[str], float], steps: int, seed: int) -> tuple[str, float]:
    """The best tile of so many steps, a quarter of them from each of four random beginnings."""
    found = []
    for start in range(RESTARTS):
        rng = stream(f"attracting/{seed}/{start}")
        best = "".join(f"{rng.below(len(PALETTE)):x}" for _ in range(16))
        value = share(best)
        for _ in range(steps // RESTARTS):
            cells = list(best)
            for _ in range(rng.between(1, 2)):
                cells[rng.below(16)] = f"{rng.below(len(PALETTE)):x}"
            tried = "".join(cells)
            if (now := share(tried)) > value:
                best, value = tried, now
        found.append((value, best))
    value, best = max(found)
    return best, value


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    share = shares()
    tile, value = climb(share, args.steps, args.seed)
    print(f"{tile}: {100 * value:.1f}% of the attention on {100 * AREA:.1f}% of the picture; TILE {TILE}: {100 * share(TILE):.1f}%")
    return 0


if __name__ == "__main__":
    run_as_command(main)
