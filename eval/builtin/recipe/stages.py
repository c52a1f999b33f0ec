"""The five stages of ``train.py``: what is trained, on what, and when it is saved."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mllm_efficient.trained.export import name_for_vllm

from ..architecture import build_config, build_processor
from ..questions import CATEGORIES
from .data import POOL, build
from .muon import Muon
from .packed import N, Packed
from .schedule import QUESTIONS, STAGES, VAL, WEIGHTS, Log, Stage, cosine

SAVE_EVERY, LOG_EVERY, VAL_EVERY = 200, 50, 400


def new_model(seed: int) -> Packed:
    """A fresh packed model; the same seed gives the same weights in every process."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    packed = Packed(LlavaForConditionalGeneration(build_config()).train())
    for embedding in (*packed.symbols, packed.place):
        nn.init.normal_(embedding.weight, std=0.3)
    return packed


def parts(packed: Packed) -> dict[str, list[nn.Parameter]]:
    m = packed.model.model
    return {
        "tower": list(m.vision_tower.parameters()),
        "projector": list(m.multi_modal_projector.parameters()),
        "language": list(m.language_model.parameters()),
        "dense": [p for k in (packed.dense, packed.coordinates) for p in k.parameters()],
        "symbols": [p for k in (packed.symbols, packed.place, packed.symbol_mlp) for p in k.parameters()],
    }


def trained_parts(stage: str) -> tuple[str, ...]:
    return {
        "vision": ("tower", "dense"),
        "language": ("language", "symbols"),
        "align": ("projector",),
        "joint": ("tower", "projector", "language", "dense"),
        "relate": ("tower", "projector", "language", "dense"),
    }[stage]


def optimisers(packed: Packed, stage: str) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, heads, norms and biases."""
    by_part, hidden, rest = parts(packed), [], []
    embeddings = {id(p) for m in packed.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for part in trained_parts(stage):
        muon_lr, adam_lr = getattr(STAGES[stage], "tower" if part == "tower" else "rest")
        matrices = [p for p in by_part[part] if p.ndim == 2 and id(p) not in embeddings and part != "dense" and muon_lr]
        taken = {id(p) for p in matrices}
        hidden.append({"params": matrices, "lr": muon_lr, "base": muon_lr})
        others = [p for p in by_part[part] if id(p) not in taken]
        rest.append({"params": others, "lr": adam_lr, "base": adam_lr})
    hidden = [g for g in hidden if g["params"]]
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.02)]
    return out + ([Muon(hidden, lr=1e-3)] if hidden else [])


def load_part(packed: Packed, path: Path) -> None:
    unknown = packed.load_state_dict(load_file(path), strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{path} has unknown weights: {unknown[:3]}")


def start_from(packed: Packed, stage: str, args) -> None:
    """Loads what earlier stages trained: each stage's file holds its own part alone."""
    earlier = {"align": ("vision", "language"), "joint": ("vision", "language", "align"), "relate": ("joint",)}
    sources = [args.output_dir / f"{name}.safetensors" for name in earlier.get(stage, ())]
    for path in sources if args.init is None else [args.init]:
        load_part(packed, path)


class Batches:
    """Random batches of this process's share of the images, the same stream on every run."""

    def __init__(self, arrays: dict[str, np.ndarray], stage: Stage, rank: int, world: int, seed: int):
        self.a, self.batch, self.mix = arrays, stage.batch // world, np.log(stage.mix)
        n = len(arrays["images"]) // world
        self.low, self.high, self.seed, self.rank = rank * n, (rank + 1) * n, seed, rank

    def at(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, self.rank, step])
        rows = np.sort(rng.integers(self.low, self.high, self.batch))
        likely = self.mix[self.a["meta"][rows, :, 1]] + rng.gumbel(size=(self.batch, POOL))
        pick = np.argsort(-likely, axis=1)[:, :QUESTIONS]
        meta = np.take_along_axis(self.a["meta"][rows], pick[..., None], 1)
        jitter = np.where(rng.random(self.batch) < 0.5, rng.uniform(0.06, 1, self.batch), 1.0)
        weight = np.array(WEIGHTS)[meta[..., 1]]
        return {
            "images": torch.from_numpy(self.a["images"][rows]),
            "labels": torch.from_numpy(self.a["labels"][rows].astype(np.int64)),
            "blocks": torch.from_numpy(np.take_along_axis(self.a["blocks"][rows], pick[..., None], 1).astype(np.int64)),
            "ask_at": torch.from_numpy(meta[..., 0].astype(np.int64)),
            "weight": torch.from_numpy(weight.astype(np.float32)),
            "scale": torch.from_numpy(jitter.astype(np.float32)),
            "blind": torch.from_numpy(rng.random((self.batch, QUESTIONS)) < 0.03),
        }


def visual_subset(visual: Tensor, rng: np.random.Generator) -> Tensor:
    """The dropping ablation: a random count of tokens, the same in the batch, of random places in each image."""
    keep = int(rng.choice([9, 18, 36, 72, N], p=[0.2, 0.2, 0.2, 0.2, 0.2]))
    index = torch.from_numpy(np.sort(rng.permuted(np.tile(np.arange(N), (len(visual), 1)), axis=1)[:, :keep], 1))
    return visual.gather(1, index[..., None].expand(-1, -1, visual.shape[-1]))


def loss_of(packed: Packed, stage: str):
    """The stage's loss as a function of a batch; the expensive halves are compiled."""
    answer = torch.compile(packed.answer_loss)
    if stage == "vision":
        see = torch.compile(lambda images, labels: packed.dense_loss(packed.tower(images), labels))

        def vision(b, rng):
            loss, recall = see(b["images"], b["labels"])
            names = ("colour", "shape", "size", "centre", "digit")
            return loss, {f"recall_{k}": round(v.item(), 3) for k, v in zip(names, recall)}

        return vision
    if stage == "language":

        def language(b, rng):
            symbols = packed.symbolic(b["labels"])
            loss, hits = answer(symbols, b["blocks"], b["ask_at"], b["scale"], b["blind"], torch.ones_like(b["weight"]))
            return loss, {"hits": round(hits.float().mean().item(), 3)}

        return language
    if stage == "align":

        def align(b, rng):
            with torch.no_grad():
                features, wanted = packed.tower(b["images"]), packed.symbolic(b["labels"])
            return nn.functional.mse_loss(packed.project(features), wanted) / wanted.var(), {}

        return align
    look = torch.compile(lambda images, labels: _joint_vision(packed, images, labels, STAGES[stage].coordinates))

    def joint(b, rng):
        visual, dense, recall = look(b["images"], b["labels"])
        visual = visual if rng is None else visual_subset(visual, rng)
        loss, hits = answer(visual, b["blocks"], b["ask_at"], b["scale"], b["blind"], b["weight"])
        shown = {"answer_loss": round(loss.item(), 4), "hits": round(hits.float().mean().item(), 3)}
        return loss + 0.15 * dense, shown | {"recall_digit": round(recall[4].item(), 3)}

    return joint


def _joint_vision(packed: Packed, images: Tensor, labels: Tensor, coordinates: float) -> tuple[Tensor, Tensor, Tensor]:
    features = packed.tower(images)
    dense, recall = packed.dense_loss(features, labels)
    if coordinates:
        dense = dense + coordinates / 0.15 * packed.coordinate_loss(features)
    return packed.project(features), dense, recall


@torch.no_grad()
def validate(packed: Packed, stage: str, val: dict[str, np.ndarray], images: int = VAL) -> dict[str, float]:
    """Accuracy in percent per category on validation images, all visual tokens, and the unweighted mean."""
    hits, total = np.zeros(len(CATEGORIES)), np.zeros(len(CATEGORIES))
    for low in range(0, images, 50):
        rows = slice(low, low + 50)
        if stage == "language":
            visual = packed.symbolic(torch.from_numpy(val["labels"][rows].astype(np.int64)))
        else:
            visual = packed.project(packed.tower(torch.from_numpy(val["images"][rows].copy())))
        blocks = torch.from_numpy(val["blocks"][rows, : len(CATEGORIES)].astype(np.int64))
        meta = torch.from_numpy(val["meta"][rows, : len(CATEGORIES)].astype(np.int64))
        see = torch.zeros(blocks.shape[:2], dtype=torch.bool)
        logits = packed.answer(visual, blocks, meta[..., 0], torch.ones(len(visual)), see)[:, :, 0]
        right = logits.argmax(-1) == blocks.gather(2, meta[..., :1] + 1)[..., 0]
        for c in range(len(CATEGORIES)):
            hits[c] += (right & (meta[..., 1] == c)).sum().item()
            total[c] += (meta[..., 1] == c).sum().item()
    each = 100 * hits / np.maximum(total, 1)
    return {"macro": round(each.mean(), 2), **{c: round(v, 1) for c, v in zip(CATEGORIES, each)}}


def run_stage(stage: str, args) -> None:
    """Runs one stage to its end, resuming from ``OUTPUT_DIR/STAGE.partial.safetensors`` if it is there."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    settings = STAGES[stage]
    steps = max(1, round(settings.steps * args.steps_scale))
    train, val = build("train", args.images, args.data_dir), build("val", VAL * 5, args.data_dir)
    packed = new_model(args.seed)
    start_from(packed, stage, args)
    wanted = {id(p) for part in trained_parts(stage) for p in parts(packed)[part]}
    for p in packed.parameters():
        p.requires_grad_(id(p) in wanted)
    trained = [p for p in packed.parameters() if p.requires_grad]
    opts = optimisers(packed, stage)
    final, partial = args.output_dir / f"{stage}.safetensors", args.output_dir / f"{stage}.partial.safetensors"
    if final.exists():
        return
    first, minutes = resume(packed, opts, partial)
    log = Log(args.output_dir / "log.jsonl", stage, minutes, quiet=rank > 0)
    batches = Batches(train, settings, rank, world, args.seed + 100 * list(STAGES).index(stage))
    loss_fn = loss_of(packed, stage)
    for step in range(first, steps):
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["base"] * cosine(step, round((settings.horizon or settings.steps) * args.steps_scale))
        rng = np.random.default_rng([args.seed, 9, step]) if args.drop and stage == "relate" else None
        loss, shown = loss_fn(batches.at(step), rng)
        for p in trained:
            p.grad = None
        loss.backward()
        if world > 1:
            average(trained, world)
        nn.utils.clip_grad_norm_(trained, 1.0)
        for opt in opts:
            opt.step()
        if step % LOG_EVERY == 0 or step == steps - 1:
            log(step=step, steps=steps, loss=round(loss.item(), 4), **shown)
        if rank == 0 and stage in ("language", "joint", "relate") and (step % VAL_EVERY == VAL_EVERY - 1 or step == steps - 1):
            log(step=step, val=validate(packed, stage, val))
        if rank == 0 and step % SAVE_EVERY == SAVE_EVERY - 1 and step < steps - 1:
            checkpoint(packed, opts, partial, step + 1, log.minutes)
    if rank == 0:
        own = {n for n, p in packed.named_parameters() if p.requires_grad}
        save_file({k: v.contiguous() for k, v in packed.state_dict().items() if k in own}, final)
        if stage == "relate":
            publish(packed, args.output_dir / "model")
        partial.unlink(missing_ok=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def publish(packed: Packed, folder: Path) -> None:
    """The model and its processor with ``save_pretrained``, tower weights under the names hub checkpoints have."""
    packed.model.eval().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    weights = {name_for_vllm(k): v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def tied(key: str) -> bool:
    return key == "model.lm_head.weight"  # the embedding, stored once


def average(params: list[nn.Parameter], world: int) -> None:
    """One all-reduce of all gradients. A parameter without one (on every rank alike) is left alone."""
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world
    for g, piece in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(piece.view_as(g))


def checkpoint(packed: Packed, opts, path: Path, step: int, minutes: float) -> None:
    """Weights and optimiser state in one safetensors file, swapped in whole so that a kill leaves the old one."""
    tensors = {k: v.contiguous() for k, v in packed.state_dict().items() if not tied(k)}
    for i, opt in enumerate(opts):
        for j, state in opt.state_dict()["state"].items():
            tensors |= {f"opt.{i}.{j}.{k}": torch.as_tensor(v).contiguous() for k, v in state.items()}
    new = path.with_suffix(".new")
    save_file(tensors, new, metadata={"step": str(step), "minutes": str(minutes)})
    new.replace(path)


def resume(packed: Packed, opts, path: Path) -> tuple[int, float]:
    """(next step, minutes so far) of a partial run, its state loaded; (0, 0.0) if there is none."""
    if not path.exists():
        return 0, 0.0
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, "pt") as f:
        meta = f.metadata()
    packed.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("opt.")}, strict=False)
    for i, opt in enumerate(opts):
        whole = opt.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"opt.{i}."):
                _, _, j, name = key.split(".", 3)
                state.setdefault(int(j), {})[name] = value
        opt.load_state_dict(whole | {"state": state})
    return int(meta["step"]), float(meta["minutes"])
