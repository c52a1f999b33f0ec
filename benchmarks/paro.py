"""Does another order of the tower's tokens make its attention blockier? PARO's reordering (arXiv 2506.16054) on the embedded model.

    python benchmarks/paro.py --output-dir runs/mixers        asks and writes the answers (two minutes of one core)
    python benchmarks/paro.py --table                         the table from the answers in benchmarks/results/paro.json

PARO permutes the tokens of every attention head by one of a few orders, found offline, so that what is attended to lies in few blocks,
and leaves the other blocks out by a mask that does not depend on the picture. Here: blocks of 12 x 12 of the 144 patches, the class token
dense; of each layer and head the blocks that hold most attention over training pictures stay. ``raster`` keeps the order, ``chosen`` takes
for every head the order whose blocks hold most, ``shuffled`` one order of chance. No kernel skips anything here: the table says what would
be kept of attention and answers, not what would be saved in time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mixers import questions, resampled, shown  # beside this file

import mllm_efficient as me
from mllm_efficient.eval.builtin.architecture import GRID
from mllm_efficient.eval.builtin.recipe.data import build

BLOCK, N = 12, GRID * GRID
DENSITIES = (0.5, 0.3, 0.2)
ARMS = ("raster", "chosen", "shuffled")
CALIBRATED, ASKED = 200, 200  # training pictures, test pictures
RESULTS = Path(__file__).parent / "results" / "paro.json"


def orders() -> dict[str, np.ndarray]:
    """(N,) patches in each of the orders: rows, columns, tiles row by row, and Z."""
    row, column = np.divmod(np.arange(N), GRID)
    out = {"rows": np.arange(N), "columns": np.lexsort((row, column))}
    for high, wide in ((2, 6), (6, 2), (3, 4), (4, 3)):
        out[f"tiles of {high}x{wide}"] = np.lexsort((column % wide, row % high, column // wide, row // high))
    spread = sum(((row >> bit & 1) << 2 * bit + 1) | ((column >> bit & 1) << 2 * bit) for bit in range(4))
    return {**out, "Z": np.argsort(spread, kind="stable")}


def blocks_of(attention: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(..., B, B) attention (..., N, N) that lies in each block, of tokens in an order."""
    ordered = attention[..., order[:, None], order]
    side = N // BLOCK
    return ordered.reshape(*attention.shape[:-2], side, BLOCK, side, BLOCK).sum((-3, -1))


def most(blocks: np.ndarray, density: float) -> np.ndarray:
    """(B, B) bool: the blocks that stay, those of most attention."""
    keep = np.zeros(blocks.size, dtype=bool)
    keep[np.argsort(-blocks.ravel(), kind="stable")[: round(density * blocks.size)]] = True
    return keep.reshape(blocks.shape)


def mask_of(keep: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(N + 1, N + 1) bool of all tokens in their own order, the class token first and dense."""
    own = np.empty(N, dtype=int)
    own[order] = np.arange(N)
    mask = np.ones((N + 1, N + 1), dtype=bool)
    mask[1:, 1:] = keep[own[:, None] // BLOCK, own // BLOCK]
    return mask


def tower(model: Any, images: np.ndarray, masks: Any = None, seen: list[Any] | None = None) -> Any:
    """Features (B, N, D) of uint8 images. masks: of each layer (heads, N + 1, N + 1). seen: is given each layer's mean attention."""
    import torch

    from mllm_efficient.eval.builtin.architecture import MEAN, STD

    v, b = model.model.vision_tower, len(images)
    x = (torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 255 - MEAN[0]) / STD[0]
    x = v.pre_layrnorm(v.embeddings(x))
    for i, layer in enumerate(v.encoder.layers):
        h, a = layer.layer_norm1(x), layer.self_attn
        q, k, w = (p(h).view(b, N + 1, -1, a.head_dim).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        scores = q @ k.transpose(-1, -2) * a.head_dim**-0.5
        scores = scores if masks is None else scores.masked_fill(~masks[i], float("-inf"))
        weights = scores.softmax(-1)
        if seen is not None:
            seen.append(weights[:, :, 1:, 1:].sum(0).numpy())
        x = x + a.out_proj((weights @ w).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
    return x[:, 1:]


def attention(model: Any, folder: Path) -> np.ndarray:
    """(layers, heads, N, N) the mean over training pictures."""
    images, total = build("train", CALIBRATED, folder, workers=1)["images"], None
    for low in range(0, CALIBRATED, 25):
        seen = list[Any]()
        tower(model, np.array(images[low : low + 25]), seen=seen)
        total = np.stack(seen) if total is None else total + np.stack(seen)
    assert total is not None
    return total / CALIBRATED


def ask(folder: Path) -> dict[str, Any]:
    """What each arm keeps of attention at each density, the orders that were chosen, and answers."""
    import torch

    from mllm_efficient.eval.builtin.recipe.packed import Packed

    model, _ = me.builtin(device="cpu")
    packed, known, drawn = Packed(model), orders(), np.random.default_rng(0).permutation(N)
    test = build("test", ASKED, folder, workers=1)
    with torch.no_grad():
        seen = attention(model, folder)
        layers, heads = seen.shape[:2]
        out: dict[str, Any] = {"full": {"right": right(packed, test, None)}}
        for density in DENSITIES:
            for arm in ARMS:
                kept, masks, names = list[float](), np.empty((layers, heads, N + 1, N + 1), dtype=bool), list[str]()
                for layer, head in np.ndindex(layers, heads):
                    tried = {"raster": {"rows": known["rows"]}, "shuffled": {"chance": drawn}}.get(arm, known)
                    found = {name: blocks_of(seen[layer, head], order) for name, order in tried.items()}
                    held = {name: blocks[most(blocks, density)].sum() / blocks.sum() for name, blocks in found.items()}
                    name = max(held, key=lambda n: held[n])
                    masks[layer, head] = mask_of(most(found[name], density), tried[name])
                    kept.append(float(held[name]))
                    names.append(name)
                counts = {name: names.count(name) for name in sorted(set(names))}
                answers = right(packed, test, torch.from_numpy(masks))
                out[f"{arm} {density}"] = {"kept": round(float(np.mean(kept)), 4), "orders": counts, "right": answers}
    return out


def right(packed: Any, test: dict[str, np.ndarray], masks: Any) -> str:
    """ "1" for each test question answered right and "0" for each other one."""
    import torch

    hits = []
    for low in range(0, ASKED, 25):
        blocks, meta = (torch.from_numpy(np.array(test[k][low : low + 25]).astype(np.int64)) for k in ("blocks", "meta"))
        there = meta[..., 1] != 255
        visual = packed.project(tower(packed.model, np.array(test["images"][low : low + 25]), masks))
        none = torch.zeros(there.shape, dtype=torch.bool)
        logits = packed.answer(visual, blocks, meta[..., 0], torch.ones(len(visual)), none)[:, :, 0]
        wanted = blocks.gather(2, (meta[..., 0] + 1)[..., None])[..., 0]
        hits.append((logits.argmax(-1) == wanted)[there])
    return "".join(str(int(h)) for h in torch.cat(hits).tolist())


def lines(results: Path) -> Iterator[str]:
    found, about = json.loads(results.read_text()), [q for q in questions("test") if q[0] < ASKED]
    scores = {name: resampled(row["right"], about) for name, row in found.items()}
    yield "| order | blocks kept | attention kept | macro | - all blocks | - raster |"
    yield "|---|---|---|---|---|---|"
    yield f"| any | 100% | 100% | {scores['full'][0]:.1f} |  |  |"
    for density in DENSITIES:
        for arm in ARMS:
            own = scores[name := f"{arm} {density}"]
            beside = "" if arm == "raster" else shown(own - scores[f"raster {density}"])
            cells = (
                arm,
                f"{100 * density:.0f}%",
                f"{100 * found[name]['kept']:.1f}%",
                f"{own[0]:.1f}",
                shown(own - scores["full"]),
                beside,
            )
            yield f"| {' | '.join(cells)} |"
    yield ""
    for density in DENSITIES:
        chosen = ", ".join(f"{name} {n}" for name, n in found[f"chosen {density}"]["orders"].items())
        yield f"- heads by chosen order at {100 * density:.0f}%: {chosen}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, help="where drawn pictures are kept, those of mixers.py")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where answers are (default: beside this file)")
    parser.add_argument("--table", action="store_true", help="print the table of the answers that are there")
    args = parser.parse_args(argv)
    if args.output_dir is None and not args.table:
        parser.error("--output-dir or --table is needed")
    if not args.table:
        args.results.write_text(json.dumps(ask(args.output_dir)) + "\n")
    print("\n".join(lines(args.results)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
