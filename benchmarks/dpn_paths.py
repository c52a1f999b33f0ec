"""Which kernels at which layers: a mixture of supernets, one supernet and DPN's fixed placement against all 27 paths by brute force.

    python benchmarks/dpn_paths.py --output-dir runs/mixers         trains, asks, writes the answers; an interrupted run goes on
    python benchmarks/dpn_paths.py --table                          the tables from the answers in benchmarks/results/dpn_paths

A path is a kernel (1x1, 1x2 or 2x2, maximum) before each of the decoder's layers 1, 2 and 3, the same for every question: what
``dpn:routing=fixed,kernel=1x1/1x2/2x2`` runs, without its floor of 18 tokens. ``alone`` trains the embedded model's language model
along one path, for every path. ``supernet`` trains one copy along paths drawn evenly; ``mixture`` three copies, drawn by a table of
how well each did along a path, balanced so that all copies are used alike (arXiv 2306.11982). Both say of every path how right it
is, and what counts is how the path of the best score at a cost does when it is trained alone, as that paper retrains what it chose.
``shipped`` trains nothing: it asks the weights that ship as ``dpn``, which saw all paths as their router chose them, along every path.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mixers import TAIL, features, questions, resampled, shown  # beside this file

import mllm_efficient as me
from mllm_efficient.eval.builtin.architecture import GRID, VOCABULARY
from mllm_efficient.measure.flops import load_shape, prefill_flops

KERNELS = ((1, 1), (1, 2), (2, 2))
PATHS = tuple(itertools.product(KERNELS, repeat=3))
COPIES = {"supernet": 1, "mixture": 3}
IMAGES, QUESTIONS, TEXT = 8, 6, 16  # of a step; text tokens of a prompt for its FLOPs
SHIPPED = "shipped"
STEPS = {"alone": 40, "supernet": 400, "mixture": 400}
VAL = 100  # scenes of a score
KINDS = (SHIPPED, *STEPS)
RATE, KEPT, HOTTEST = 3e-4, 0.9, 100.0  # learning rate; of the table's old value; the mixture's last temperature
BUDGETS = (40, 45, 50, 55, 60, 70)  # percent of the prefill's FLOPs
BRUTE, FIXED = "brute force", "one kernel"
RESULTS = Path(__file__).parent / "results" / "dpn_paths"


def name_of(path: Sequence[tuple[int, int]]) -> str:
    return "/".join(f"{rows}x{columns}" for rows, columns in path)


def layers_of(path: Sequence[tuple[int, int]]) -> list[int]:
    """Visual tokens of each decoder layer."""
    rows, columns, out = GRID, GRID, [GRID * GRID]
    for kernel in path:
        rows, columns = rows // kernel[0], columns // kernel[1]
        out.append(rows * columns)
    return out


def left(path: Sequence[tuple[int, int]]) -> float:
    """Prefill FLOPs in percent of those with all tokens."""
    decoder = load_shape("builtin").decoder
    whole = prefill_flops(decoder, [GRID * GRID + TEXT] * decoder.layers)
    return 100 * prefill_flops(decoder, [n + TEXT for n in layers_of(path)]) / whole


# ------------------------------------------------------------------------------------------------ the model along a path


def along(lm: Any, visual: Any, blocks: Any, ask_at: Any, path: Sequence[tuple[int, int]]) -> Any:
    """Logits (B, Q, V) at the ":" of every question. visual (B, N, D); blocks (B, Q, T) ids; ask_at (B, Q).

    The questions of a picture share its tokens and do not see each other.
    """
    import torch
    from torch.nn import functional as F

    from mllm_efficient.eval.builtin.recipe.packed import rms_norm, rotary, rotate

    (b, n, d), (q, t), cfg = visual.shape, blocks.shape[1:], lm.config
    heads, first = cfg.num_attention_heads, torch.tensor([VOCABULARY[word] for word in ("<s>", "user", ":")])
    x = torch.cat([lm.embed_tokens(first).expand(b, -1, d), visual, lm.embed_tokens(blocks).flatten(1, 2)], 1)
    turn = torch.cat([torch.zeros(3 + n, dtype=torch.long), torch.arange(1, 1 + q).repeat_interleave(t)])
    grid = (GRID, GRID)
    for i, layer in enumerate(lm.layers):
        if i and path[i - 1] != (1, 1):
            x, grid = pooled(x, grid, path[i - 1])
            turn = turn[-(x.shape[1]) :]  # of what all see there is less
        order, a, shared = torch.arange(len(turn)), layer.self_attn, len(turn) - q * t
        place = torch.cat([torch.arange(shared), torch.arange(shared, shared + t).repeat(q)])
        seen = ((turn == 0) | (turn == turn[:, None])) & (order <= order[:, None])
        h, around = rms_norm(x, layer.input_layernorm, cfg.rms_norm_eps), rotary(place.float(), d // heads // 2, 10000.0)
        query, key, value = (p(h).unflatten(-1, (heads, -1)) for p in (a.q_proj, a.k_proj, a.v_proj))
        query, key, value = (part.transpose(1, 2) for part in (rotate(query, *around), rotate(key, *around), value))
        x = x + a.o_proj(F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2))
        h = rms_norm(x, layer.post_attention_layernorm, cfg.rms_norm_eps)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
    asked = x[:, -q * t :].unflatten(1, (q, t)).gather(2, ask_at[..., None, None].expand(-1, -1, 1, d))[:, :, 0]
    return F.linear(rms_norm(asked, lm.norm, cfg.rms_norm_eps), lm.embed_tokens.weight)


def pooled(x: Any, grid: tuple[int, int], kernel: tuple[int, int]) -> tuple[Any, tuple[int, int]]:
    """States (B, L, D) whose visual tokens are the maxima of kernels, and the grid that is left."""
    import torch
    from torch.nn import functional as F

    rows, columns = grid
    end = 3 + rows * columns
    plane = F.max_pool2d(x[:, 3:end].transpose(1, 2).unflatten(2, grid), kernel)
    return torch.cat([x[:, :3], plane.flatten(2).transpose(1, 2), x[:, end:]], 1), (plane.shape[2], plane.shape[3])


class Data:
    """Batches of a split as the language model takes them. features: of the tower, computed once."""

    def __init__(self, projector: Any, split: str, folder: Path):
        self.projector, (self.features, self.arrays) = projector, features(split, folder)

    def of(self, images: np.ndarray, chosen: np.ndarray | None = None) -> tuple[Any, Any, Any, Any]:
        """Visual tokens (B, N, D), blocks (B, Q, T), the places of ":" (B, Q), and which questions there are (B, Q)."""
        import torch

        blocks, meta = (self.arrays[name][images] for name in ("blocks", "meta"))
        if chosen is not None:
            blocks, meta = (np.take_along_axis(part, chosen[..., None], 1) for part in (blocks, meta))
        with torch.no_grad():
            visual = self.projector(torch.from_numpy(np.array(self.features[images])).float())
        blocks, meta = (torch.from_numpy(part.astype(np.int64)) for part in (blocks, meta))
        return visual, blocks, meta[..., 0], meta[..., 1] != 255

    def drawn(self, rng: np.random.Generator) -> tuple[Any, Any, Any]:
        """A batch of a step, all of whose questions are there."""
        images, there = np.sort(rng.choice(len(self.features), IMAGES, replace=False)), (self.arrays["meta"][..., 1] != 255).sum(1)
        chosen = np.stack([np.sort(rng.choice(there[i], QUESTIONS, replace=there[i] < QUESTIONS)) for i in images])
        return self.of(images, chosen)[:3]


def right(logits: Any, blocks: Any, ask_at: Any) -> tuple[Any, Any]:
    """Cross-entropy of the answers, and which are right (B, Q)."""
    from torch.nn import functional as F

    wanted = blocks.gather(2, (ask_at + 1)[..., None])[..., 0]
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten()), logits.argmax(-1) == wanted


def balanced(table: np.ndarray, temperature: float) -> np.ndarray:
    """(paths, copies) chances of each copy for a path: a softmax of the table, then all copies made equally likely over the paths."""
    chances = np.exp(temperature * (table - table.max(1, keepdims=True)))
    chances /= chances.sum(1, keepdims=True)
    for _ in range(10000):
        marginal = chances.mean(0)
        if (marginal * np.log(marginal * len(marginal))).sum() < 1e-4:
            break
        chances = chances / marginal
        chances /= chances.sum(1, keepdims=True)
    return chances


# ------------------------------------------------------------------------------------------------ runs


def train(kind: str, only: int | None, seed: int, folder: Path) -> tuple[list[Any], np.ndarray, Any, dict[str, Any]]:
    """Copies of the language model trained along paths, the table (paths, copies), and the projector. only: the one path of ``alone``."""
    import torch

    model, _ = me.builtin(device="cpu")
    model.requires_grad_(False)
    projector, n, steps = model.model.multi_modal_projector, COPIES.get(kind, 1), STEPS[kind]
    copies = [copy.deepcopy(model.model.language_model).requires_grad_(True) for _ in range(n)]
    optimizers = [torch.optim.AdamW(c.parameters(), RATE, weight_decay=0.02) for c in copies]
    data, held = (Data(projector, split, folder) for split in ("train", "val"))
    rng, table, began = np.random.default_rng([seed, 11]), np.ones((len(PATHS), n)), time.process_time()
    choices, losses = np.random.default_rng([seed, 13]), list[float]()
    for step in range(steps):
        path = only if only is not None else int(choices.integers(len(PATHS)))
        chances = balanced(table, 1 + (HOTTEST - 1) * step / max(1, steps - 1))[path]
        at = int(choices.choice(n, p=chances / chances.sum()))
        lm, optimizer = copies[at], optimizers[at]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 5) * 0.5 * (1 + np.cos(np.pi * step / steps))
        visual, blocks, ask_at = data.drawn(rng)
        loss, _ = right(along(lm, visual, blocks, ask_at, PATHS[path]), blocks, ask_at)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if kind == "mixture":
            with torch.no_grad():
                visual, blocks, ask_at = held.drawn(choices)
                hits = right(along(lm, visual, blocks, ask_at, PATHS[path]), blocks, ask_at)[1]
            table[path, at] = KEPT * table[path, at] + (1 - KEPT) * hits.float().mean().item()
    log = {"steps": steps, "cpu_seconds": round(time.process_time() - began, 1), "losses": [round(float(np.mean(losses[-10:])), 4)]}
    return copies, table, projector, log


def asked(lm: Any, projector: Any, path: Sequence[tuple[int, int]], split: str, folder: Path, scenes: int) -> str:
    """ "1" for each question answered right and "0" for each other one."""
    import torch

    data, hits = Data(projector, split, folder), []
    with torch.no_grad():
        for low in range(0, scenes, 50):
            visual, blocks, ask_at, there = data.of(np.arange(low, min(low + 50, scenes)))
            most = int(there.sum(1).max())
            blocks, ask_at, there = blocks[:, :most], ask_at[:, :most], there[:, :most]
            hits.append(right(along(lm, visual, blocks, ask_at, path), blocks, ask_at)[1][there])
    return "".join(str(int(h)) for h in torch.cat(hits).tolist())


def shipped(folder: Path, results: Path) -> None:
    """Answers of the weights that ship, along every path; each path's are kept as they come."""
    import torch

    file = results / f"{SHIPPED}-0.json"
    out = json.loads(file.read_text()) if file.exists() else {"kind": SHIPPED, "seed": 0, "val": {}, "test": {}}
    torch.set_num_threads(1)
    model, _ = me.builtin(device="cpu")
    projector = copy.deepcopy(model.model.multi_modal_projector)
    with me.compressed(model, "dpn"):
        lm = copy.deepcopy(model.model.language_model)
    results.mkdir(parents=True, exist_ok=True)
    for path in PATHS:
        if name_of(path) not in out["test"]:
            out["val"][name_of(path)] = asked(lm, projector, path, "val", folder, VAL)
            out["test"][name_of(path)] = asked(lm, projector, path, "test", folder, TAIL)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(out) + "\n")
            partial.replace(file)
            print(f"{SHIPPED} {name_of(path)} is done", flush=True)


def one_run(kind: str, only: int | None, seed: int, folder: Path, results: Path) -> None:
    import torch

    label = kind if only is None else f"{kind}-{name_of(PATHS[only]).replace('/', '-')}"
    file = results / f"{label}-{seed}.json"
    if file.exists():
        return
    torch.set_num_threads(1)
    copies, table, projector, log = train(kind, only, seed, folder)
    out: dict[str, Any] = {"kind": kind, "seed": seed, **log}
    if only is None:
        best = balanced(table, HOTTEST).argmax(1)
        scored = {name_of(path): asked(copies[best[i]], projector, path, "val", folder, VAL) for i, path in enumerate(PATHS)}
        out |= {"val": scored, "table": table.round(4).tolist(), "copies": best.tolist()}
    else:
        path = PATHS[only]
        out |= {"path": name_of(path), "val": asked(copies[0], projector, path, "val", folder, VAL)}
        out |= {"test": asked(copies[0], projector, path, "test", folder, TAIL)}
    results.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(out) + "\n")
    partial.replace(file)
    print(f"{label}-{seed} is done", flush=True)


# ------------------------------------------------------------------------------------------------ tables


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The runs of seed 0 by kind, those of ``alone`` by their path."""
    runs = (json.loads(file.read_text()) for file in sorted(results.glob("*-0.json")))
    return {run.get("path", run["kind"]): run for run in runs}


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks, equal values their mean one."""
    values = np.asarray(values)
    return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2


class Found:
    """What the runs say. cost: of every path; score: its test accuracy trained alone, with resamples; said: by whom, what of each path."""

    def __init__(self, results: Path):
        self.runs, self.cost = read(results), {name_of(path): left(path) for path in PATHS}
        self.names = [name for name in self.cost if name in self.runs]
        val, test = ([q for q in questions(split) if q[0] < n] for split, n in (("val", VAL), ("test", TAIL)))
        self.score = {name: resampled(self.runs[name]["test"], test) for name in self.names}
        self.said = {BRUTE: {name: resampled(self.runs[name]["val"], val)[0] for name in self.names}}
        for kind in COPIES:
            if kind in self.runs:
                self.said[kind] = {name: resampled(self.runs[kind]["val"][name], val)[0] for name in self.names}

    def chosen(self, kind: str, budget: float) -> str | None:
        """The path within a budget that somebody says is best; of FIXED, of those with one kernel at all layers."""
        cheap = [n for n in self.names if self.cost[n] <= budget and (kind != FIXED or len(set(n.split("/"))) == 1)]
        said = self.said[BRUTE if kind == FIXED else kind]
        return max(cheap, key=lambda name: (said[name], -self.cost[name]), default=None)

    def correlation(self, kind: str, other: dict[str, float]) -> float:
        """Of ranks of the paths."""
        return float(np.corrcoef(*(ranks([said[n] for n in self.names]) for said in (self.said[kind], other)))[0, 1])


def lines(results: Path) -> Iterator[str]:
    runs = read(results)
    if SHIPPED in runs:
        yield from of_shipped(runs[SHIPPED])
    if {*map(name_of, PATHS), *COPIES} <= set(runs):
        yield ""
        yield from of_trained(Found(results))


def of_shipped(run: dict[str, Any]) -> Iterator[str]:
    """What the best path of each cost gains over one kernel at all layers, which DPN's controls force, on the weights that ship."""
    val, test = ([q for q in questions(split) if q[0] < n] for split, n in (("val", VAL), ("test", TAIL)))
    cost, names = {name_of(path): left(path) for path in PATHS}, list(run["test"])
    said = {name: resampled(run["val"][name], val)[0] for name in names}
    score = {name: resampled(run["test"][name], test) for name in names}
    yield "| FLOPs up to | best of all paths | FLOPs | macro | one kernel | FLOPs | macro | all paths - one kernel |"
    yield "|---" * 8 + "|"
    for budget in BUDGETS:
        cells, paths = list[str](), []
        for of in (names, [name for name in names if len(set(name.split("/"))) == 1]):
            path = max((name for name in of if cost[name] <= budget), key=lambda name: (said[name], -cost[name]), default=None)
            paths.append(path)
            cells += ["", "", ""] if path is None else [path, f"{cost[path]:.1f}%", f"{score[path][0]:.1f}"]
        first, second = paths
        away = "" if first is None or second is None else "the same" if first == second else shown(score[first] - score[second])
        yield f"| {budget}% | {' | '.join(cells)} | {away} |"
    tested = {name: score[name][0] for name in names}
    yield ""
    for layer in range(3):
        means = {k: np.mean([tested[n] for n in names if n.split("/")[layer] == k]) for k in ("1x1", "1x2", "2x2")}
        costs = {k: np.mean([cost[n] for n in names if n.split("/")[layer] == k]) for k in means}
        said_of = ", ".join(f"{k} {means[k]:.1f} at {costs[k]:.1f}%" for k in means)
        yield f"- mean of the nine paths with each kernel before layer {layer + 1}: {said_of}"


def of_trained(found: Found) -> Iterator[str]:
    """What each chooses at each cost, trained alone."""
    kinds = (*found.said, FIXED)
    yield f"| FLOPs up to | {' | '.join(kind if kind == BRUTE else f'{kind} | - brute force' for kind in kinds)} |"
    yield "|---" * (2 * len(kinds)) + "|"
    for budget in BUDGETS:
        cells, best = list[str](), found.chosen(BRUTE, budget)
        assert best is not None
        for kind in kinds:
            path = found.chosen(kind, budget)
            own = "none" if path is None else f"{path}: {found.score[path][0]:.1f}"
            away = "" if path is None else "the same" if path == best else shown(found.score[path] - found.score[best])
            cells += [own] if kind == BRUTE else [own, away]
        yield f"| {budget}% | {' | '.join(cells)} |"
    yield ""
    tested = {name: found.score[name][0] for name in found.names}
    for kind in found.said:
        alone = "" if kind == BRUTE else f"{found.correlation(kind, found.said[BRUTE]):.2f} with their validation alone, "
        yield f"- {kind}, ranks of {len(found.names)} paths: {alone}{found.correlation(kind, tested):.2f} with their test alone"
    seconds = {BRUTE: sum(found.runs[n]["cpu_seconds"] for n in found.names)}
    seconds |= {kind: found.runs[kind]["cpu_seconds"] for kind in found.said if kind != BRUTE}
    yield f"- training, CPU s: {', '.join(f'{kind} {spent:.0f}' for kind, spent in seconds.items())}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, help="where drawn pictures and features are kept, those of mixers.py")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where answers are (default: beside this file)")
    parser.add_argument("--table", action="store_true", help="print the tables of the answers that are there")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="two commands with others share the work")
    args = parser.parse_args(argv)
    if args.output_dir is None and not args.table:
        parser.error("--output-dir or --table is needed")
    for kind in () if args.table else args.kinds:
        if kind == SHIPPED:
            shipped(args.output_dir, args.results)
            continue
        for only in range(len(PATHS)) if kind == "alone" else (None,):
            one_run(kind, only, 0, args.output_dir, args.results)
    if args.table or args.kinds == list(KINDS):
        print("\n".join(lines(args.results)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
