"""Mixers and poolings of a TokenFLEX projector on the embedded model, each against the plain one, as a table.

    python benchmarks/mixers.py --output-dir runs/mixers            trains, asks, writes the answers; an interrupted run goes on
    python benchmarks/mixers.py --table                             the tables from the answers in benchmarks/results/mixers

Every arm starts from the projector and language model that ship as ``tokenflex``, with what it adds drawn anew, and trains both
for as many steps of 16 images x 6 questions, the count drawn evenly from 36, 16 and 9. The tower stays as it is, so that its
features are computed once. ``plain`` trained for twice the steps (``plain-long``) bounds what more training time is worth. One
seed of every arm; of the four that are best on validation questions, and of ``plain``, three. ``question`` has its tokens made anew for
every question, and came when these were chosen. ``distill`` is ``plain`` with the loss of
``settings.distill=0.5``. And ``tail``: the ordered tokens with a count drawn from 1 to 64, asked at every count.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

import mllm_efficient as me
from mllm_efficient.compressors.mixing import MIXERS, POOLINGS, QUERIES, mixer_flops, pooling_flops
from mllm_efficient.eval.builtin.architecture import GRID, VOCABULARY
from mllm_efficient.eval.builtin.questions import CATEGORIES
from mllm_efficient.eval.builtin.recipe.data import build
from mllm_efficient.measure.flops import cost, load_shape
from mllm_efficient.stats import TAIL as TAIL_OF
from mllm_efficient.stats import Hits, accuracy, draws, interval

COUNTS, WIDTH = (36, 16, 9), 128  # of the tower
SQUARES = tuple(side * side for side in range(1, GRID + 1))
ARMS: dict[str, dict[str, Any]] = {
    "plain": {}, "plain-long": {}, "distill": {}, "tail": {"pooling": "prefix"},
    **{mixer: {"mixer": mixer} for mixer in MIXERS[1:]}, **{p: {"pooling": p} for p in POOLINGS[2:]},
}  # fmt: skip
CONTROLS = ("plain", "plain-long", "distill", "tail")
LATER = ("question",)  # when the four that have three seeds were chosen
ORDER = ("plain", *(a for a in ARMS if a not in CONTROLS), "tail", "plain-long", "distill")
STEPS, IMAGES, QUESTIONS = 120, 16, 6
SCENES = {"train": 2000, "val": 200, "test": 600}
TAIL = 300  # test scenes of the ordered tokens, which are asked at 64 counts
RATES = {"part": 1e-3, "factors": 3e-2, "language_model": 3e-4}
FACTORS = ("scale", "power", "region")  # one number for a channel or group: 120 small steps would leave it where it is
SEEDS, BEST = 3, 4
RESULTS = Path(__file__).parent / "results" / "mixers"


# ------------------------------------------------------------------------------------------------ one run


def start(settings: dict[str, Any], seed: int) -> tuple[Any, Any]:
    """The embedded model with the language model that ships with tokenflex, packed, and its projector with what an arm adds."""
    import torch

    from mllm_efficient.eval.builtin.recipe.packed import Packed
    from mllm_efficient.trained.projector import TokenFlexProjector

    model, _ = me.builtin(device="cpu")
    me.wrap(model, "tokenflex:tokens=36")
    shipped = model.model.multi_modal_projector
    torch.manual_seed(seed)
    projector = TokenFlexProjector(shipped.inputs, shipped.outputs, **settings)
    _, unknown = projector.load_state_dict(shipped.state_dict(), strict=False)
    assert not unknown
    return Packed(model), projector


def features(split: str, folder: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Tower features (scenes, N, D) in float16, computed once, and the questions of a split."""
    import torch

    arrays, path = build(split, SCENES[split], folder, workers=1), folder / f"features-{split}.npy"
    if not path.exists():
        packed, _ = start({}, 0)
        with torch.no_grad():
            parts = [packed.tower(torch.from_numpy(np.array(arrays["images"][i : i + 50]))).half() for i in range(0, SCENES[split], 50)]
        partial = path.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, torch.cat(parts).numpy())
        partial.replace(path)
    return np.load(path, mmap_mode="r"), arrays


def projected(projector: Any, x: Any, count: int) -> Any:
    """(B, count, D) of any count for ordered tokens, of a square otherwise."""
    if projector.config["pooling"] == "prefix":
        return projector(x, count=count, grid=(GRID, GRID))
    return projector(x, side=round(count**0.5), grid=(GRID, GRID))


def seen(packed: Any, projector: Any, x: Any, count: int, blocks: Any, ask_at: Any) -> tuple[Any, Any, Any]:
    """Visual tokens (B, count, D) and the questions (B, Q, T) that share them, with their ":"; where tokens depend on the question,
    (B Q, count, D) and (B Q, 1, T)."""
    import torch

    if not projector.asks:
        return projected(projector, x, count), blocks, ask_at
    blocks, ask_at, each = blocks.flatten(0, 1), ask_at.flatten(), x.repeat_interleave(blocks.shape[1], 0)
    start = torch.tensor([VOCABULARY[word] for word in ("<s>", "user", ":")])
    embed = packed.model.get_input_embeddings()
    text = [embed(torch.cat([start, block[: at + 1]])) for block, at in zip(blocks, ask_at.tolist())]
    return projector(each, side=round(count**0.5), grid=(GRID, GRID), text=text), blocks[:, None], ask_at[:, None]


def train(arm: str, seed: int, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    import torch

    from mllm_efficient.train.sampling import consistency, ramped

    x, arrays = features("train", folder)
    packed, projector = start(ARMS[arm], seed)
    language = list(packed.model.model.language_model.parameters())
    for parameter in packed.parameters():
        parameter.requires_grad_(False)
    for parameter in (*language, *projector.parameters()):
        parameter.requires_grad_(True)
    named = [(name.rpartition(".")[2] in FACTORS, parameter) for name, parameter in projector.named_parameters()]
    parts = {"part": [p for factor, p in named if not factor], "factors": [p for factor, p in named if factor], "language_model": language}
    groups = [{"params": members, "lr": RATES[part]} for part, members in parts.items() if members]
    optimizer, steps = torch.optim.AdamW(groups, weight_decay=0.02), STEPS * (2 if arm == "plain-long" else 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / (0.05 * steps)) * 0.5 * (1 + np.cos(np.pi * s / steps))
    )
    rng, losses, began = np.random.default_rng([seed, 7]), [], time.process_time()
    for step in range(steps):
        images = np.sort(rng.choice(len(x), IMAGES, replace=False))
        chosen = np.sort(rng.permuted(np.tile(np.arange(arrays["blocks"].shape[1]), (IMAGES, 1)), axis=1)[:, :QUESTIONS], 1)
        count = int(rng.integers(1, QUERIES + 1)) if arm == "tail" else int(rng.choice(COUNTS))
        blocks, meta = (
            torch.from_numpy(np.take_along_axis(arrays[k][images], chosen[..., None], 1).astype(np.int64)) for k in ("blocks", "meta")
        )
        features_of = torch.from_numpy(np.array(x[images])).float()
        visual, blocks, ask_at = seen(packed, projector, features_of, count, blocks, meta[..., 0])
        blind, weight = torch.zeros(blocks.shape[:2], dtype=torch.bool), torch.ones(blocks.shape[:2])
        given = blocks, ask_at, torch.ones(len(visual)), blind
        loss, _ = packed.answer_loss(visual, *given, weight)
        if arm == "distill" and count != max(COUNTS):
            with torch.no_grad():
                larger = packed.answer(projected(projector, features_of, max(COUNTS)), *given)[:, :, 0].flatten(0, 1)
            own = packed.answer(visual, *given)[:, :, 0].flatten(0, 1)
            wanted = blocks.gather(2, (ask_at + 1)[..., None]).flatten()
            loss = loss + ramped(0.5, step, steps) * consistency(own, larger, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*projector.parameters(), *language], 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    means = [round(float(np.mean(losses[i : i + steps // 10])), 4) for i in range(0, steps, steps // 10)]
    return packed, projector, {"steps": steps, "cpu_seconds": round(time.process_time() - began, 1), "losses": means}


def asked(packed: Any, projector: Any, split: str, counts: Sequence[int], folder: Path, scenes: int | None = None) -> dict[str, str]:
    """By count: "1" for each question answered right and "0" for each other one, in the order of the arrays."""
    import torch

    x, arrays = features(split, folder)
    x, most, out = x[:scenes], int((arrays["meta"][..., 1] != 255).sum(1).max()), {}
    with torch.no_grad():
        for count in counts:
            hits = []
            for low in range(0, len(x), 50):
                blocks, meta = (
                    torch.from_numpy(np.array(arrays[k][low : low + 50, :most])[: len(x) - low].astype(np.int64))
                    for k in ("blocks", "meta")
                )
                there = meta[..., 1] != 255
                features_of = torch.from_numpy(np.array(x[low : low + 50])).float()
                visual, blocks, ask_at = seen(packed, projector, features_of, count, blocks, meta[..., 0])
                none = torch.zeros(blocks.shape[:2], dtype=torch.bool)
                logits = packed.answer(visual, blocks, ask_at, torch.ones(len(blocks)), none)[:, :, 0]
                wanted = blocks.gather(2, (ask_at + 1)[..., None])[..., 0]
                hits.append((logits.argmax(-1) == wanted).view_as(there)[there])
            out[str(count)] = "".join(str(int(h)) for h in torch.cat(hits).tolist())
    return out


def one_run(arm: str, seed: int, folder: Path, results: Path) -> None:
    import torch

    path = results / f"{arm}-{seed}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    packed, projector, log = train(arm, seed, folder)
    counts = tuple(range(1, QUERIES + 1)) if arm == "tail" else tuple(reversed(SQUARES)) if arm == "plain" else COUNTS
    kept = {
        "val": asked(packed, projector, "val", COUNTS, folder),
        "test": asked(packed, projector, "test", counts, folder, TAIL if arm == "tail" else None),
    }
    results.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"arm": arm, "seed": seed, "settings": ARMS[arm], **log, **kept}) + "\n")
    partial.replace(path)
    print(f"{arm}-{seed} is done", flush=True)


# ------------------------------------------------------------------------------------------------ all runs


def run_all(folder: Path, results: Path, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """All arms with seed 0, and of the best with the others; or those named."""
    for seed in seeds:
        for arm in arms or (ORDER if seed == 0 else ("plain", *best(read(results), questions("val")))):
            one_run(arm, seed, folder, results)


def read(results: Path) -> dict[tuple[str, int], dict[str, Any]]:
    runs = (json.loads(path.read_text()) for path in sorted(results.glob("*-[0-9].json")))
    return {(r["arm"], r["seed"]): r for r in runs}


def questions(split: str) -> list[tuple[int, str]]:
    """The image and category of every question of a split."""
    from mllm_efficient.eval.builtin.questions import benchmark_questions
    from mllm_efficient.eval.builtin.scenes import make_scene

    return [(i, q.category) for i in range(SCENES[split]) for q in benchmark_questions(make_scene(split, i))]


def resampled(hits: str, about: Sequence[tuple[int, str]]) -> np.ndarray:
    """Macro accuracy in percent, the estimate first, then its paired resamples over images."""
    rows = [{"image": i, "task": c, "correct": h == "1"} for (i, c), h in zip(about, hits, strict=True)]
    images = sorted({i for i, _ in about})
    weights = np.concatenate([np.ones((1, len(images))), draws(len(images), 0)])
    return accuracy(Hits(rows, images, CATEGORIES), weights)[:, -2]


def best(found: dict[tuple[str, int], dict[str, Any]], about: Sequence[tuple[int, str]]) -> list[str]:
    """The arms of the highest mean over counts on validation questions, seed 0."""
    own = {arm: run["val"].values() for (arm, seed), run in found.items() if seed == 0 and arm not in (*CONTROLS, *LATER)}
    scores = {arm: np.mean([resampled(h, about)[0] for h in hits]) for arm, hits in own.items()}
    return sorted(scores, key=lambda arm: -scores[arm])[:BEST]


# ------------------------------------------------------------------------------------------------ tables


@functools.cache
def flops(arm: str, count: int) -> int:
    """FLOPs of a whole call with 16 text tokens and a square count: tower, mixer, pooling, projector and prefill."""
    settings, grid = ARMS[arm], (GRID, GRID)
    added = mixer_flops(settings.get("mixer", "none"), WIDTH, grid)
    added += pooling_flops(settings.get("pooling", "bilinear"), WIDTH, grid, count, load_shape("builtin").projector.outputs)
    return cost("builtin", method=f"tokenflex:tokens={count}", text_tokens=16).total + added


def at_flops(wanted: int, by_count: dict[int, np.ndarray]) -> np.ndarray:
    """What the plain projector has at as many FLOPs: on the line between the two counts around them."""
    counts = sorted(by_count)
    costs = [flops("plain", c) for c in counts]
    high = next((i for i, c in enumerate(costs) if c >= wanted), len(costs) - 1)
    if high == 0 or costs[high] == wanted:
        return by_count[counts[high]]
    share = min(1.0, (wanted - costs[high - 1]) / (costs[high] - costs[high - 1]))
    return (1 - share) * by_count[counts[high - 1]] + share * by_count[counts[high]]


def shown(values: np.ndarray) -> str:
    low, high = interval(values[1:])
    return f"{values[0]:+.1f} [{low:+.1f}, {high:+.1f}]"


def lines(results: Path) -> Iterator[str]:
    found, about = read(results), questions("test")
    part = [q for q in about if q[0] < TAIL]
    score = {(a, s, int(c)): resampled(h, about) for (a, s), run in found.items() if a != "tail" for c, h in run["test"].items()}

    def mean(arm: str, count: int, seeds: Sequence[int]) -> np.ndarray:
        return np.mean([score[arm, s, count] for s in seeds], 0)

    columns = ("arm", "seeds", "tokens", "macro", "- plain", "- plain at equal FLOPs", "MFLOPs", "training, CPU s")
    yield f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    for arm in [a for a in ARMS if a != "tail" and (a, 0) in found]:
        seeds = [s for s in range(SEEDS) if (arm, s) in found and ("plain", s) in found]
        seconds = np.mean([found[arm, s]["cpu_seconds"] for s in seeds])
        for count in COUNTS:
            own, plain = mean(arm, count, seeds), mean("plain", count, seeds)
            equal = at_flops(flops(arm, count), {c: mean("plain", c, seeds) for c in SQUARES})
            differences = ("", "") if arm == "plain" else (shown(own - plain), shown(own - equal))
            cells = (arm, len(seeds), count, f"{own[0]:.1f}", *differences, f"{flops(arm, count) / 1e6:.1f}", f"{seconds:.0f}")
            yield f"| {' | '.join(map(str, cells))} |"
    if ("tail", 0) not in found:
        return
    tail = {int(c): resampled(h, part) for c, h in found["tail", 0]["test"].items()}
    squares = {c: resampled(found["plain", 0]["test"][str(c)][: len(part)], part) for c in SQUARES}
    worse = [(a, b) for a in tail for b in tail if a < b and interval((tail[b] - tail[a])[1:])[1] < 0]
    pairs, widest = QUERIES * (QUERIES - 1) // 2, -NormalDist().inv_cdf(TAIL_OF / (QUERIES * (QUERIES - 1) // 2))
    surely = [(a, b) for a, b in worse if (tail[a] - tail[b])[0] > widest * (tail[a] - tail[b])[1:].std()]
    yield f"\nPairs of which the longer prefix is worse beyond its interval: {len(worse)} of {pairs} {worse[:8]}"
    yield f"(beyond one for all pairs at once, Bonferroni: {len(surely)})\n"
    yield "| tokens | ordered | plain | ordered - plain |\n|---|---|---|---|"
    for count in tail:
        plain = squares.get(count)
        if plain is not None or count in (2, 3, 6, 12, 20, 30, 42, 56):
            beside = ("", "") if plain is None else (f"{plain[0]:.1f}", shown(tail[count] - plain))
            yield f"| {count} | {tail[count][0]:.1f} | {' | '.join(beside)} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, help="where drawn pictures and features are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where answers are (default: beside this file)")
    parser.add_argument("--table", action="store_true", help="print the tables of the answers that are there")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=[], help="these alone; two commands with others share the work")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    args = parser.parse_args(argv)
    if args.output_dir is None and not args.table:
        parser.error("--output-dir or --table is needed")
    if not args.table:
        run_all(args.output_dir, args.results, args.arms, args.seeds)
    if args.arms:
        return 0
    print("\n".join(lines(args.results)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
