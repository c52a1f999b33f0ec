"""Old import paths, which work with a warning for one release."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType

PACKAGE = "mllm_efficient"
REMOVED_IN = "0.3"
MODULES = {
    "wrapper": "apply.wrap", "shrink": "apply.prepare", "generation": "apply.generate", "layout": "apply.prompt", "plan": "apply.plan",
    "locate": "apply.locate", "positions": "apply.positions", "labels": "apply.labels", "staged": "apply.in_llm",
    "squeeze": "apply.compress", "composed": "compressors.composed",
    "projector": "trained.projector", "router": "trained.router", "saving": "trained.saving", "folders": "trained.files",
    "installing": "trained.install", "base_model": "trained.base_model", "exporting": "trained.export",
    "images": "media.images", "video": "media.video", "viz": "media.overlay", "figures": "media.figure",
    "models": "loading.models", "prompts": "loading.prompts", "processor": "loading.processor", "adapters": "loading.lora",
    "active": "apply.active", "entrance": "apply.entrance", "host": "apply.signatures", "original_prompt": "apply.original_prompt",
    "outputs": "apply.outputs", "piped": "apply.pipeline", "sharding": "apply.sharding", "stopwatch": "apply.stopwatch",
    "compressors._cosine": "compressors.math.cosine", "compressors._sums": "compressors.math.sums",
    "compressors._finite": "compressors.math.finite", "compressors._divprune_triton": "compressors.math.farthest_triton",
    "patches.attention": "patches.tower.attention", "patches.clip": "patches.tower.clip", "patches.tome": "patches.tower.merge",
    "patches.passes": "patches.decoder.passes", "patches.staging": "patches.decoder.staging", "patches.rating": "patches.decoder.rating",
    "patches.ragged": "patches.families.ragged", "launching": "cli.launching",
    "checkup": "patches.checkup", "eval.records": "eval.record.samples", "eval.stats": "stats",
    **{f"patches.{name}": f"patches.families.{name}" for name in (
        "llava", "llava_next", "llava_next_video", "llava_onevision", "qwen_vl", "internvl")},
}  # fmt: skip
NAMES = {
    "compressors.base": {"Selector": "compressors.selector", "Merger": "compressors.merger", "Resizer": "compressors.resizer",
                         "Projector": "compressors.projector"},
    "compressors.composed": {"runnable": "registry"},
    "trained.saving": {"from_pretrained": "trained.pretrained", "method_in": "trained.relocated"},
    "trained": {"load": "trained.folder"},
}  # fmt: skip


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module of ``MODULES`` by its old name: the very module that has the new one."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return importlib.machinery.ModuleSpec(fullname, self) if package == PACKAGE and name in MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = f"{PACKAGE}.{MODULES[spec.name.partition('.')[2]]}"
        _warn(spec.name, new, 1)  # warnings leaves the frames of the import system out
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None  # the import system has put the old name's in its place
        module.__spec__ = module.__spec__.loader_state


def _warn(old: str, new: str, callers: int) -> None:
    warnings.warn(f"{old} is now {new}, and the old name goes with version {REMOVED_IN}", DeprecationWarning, stacklevel=2 + callers)


def moved_name(module: str, name: str) -> object:
    """A name that another module has now, for a module's ``__getattr__``. module: without the package's name."""
    home = NAMES[module].get(name)
    if home is None:
        raise AttributeError(f"module '{PACKAGE}.{module}' has no attribute {name!r}")
    _warn(f"{PACKAGE}.{module}.{name}", f"{PACKAGE}.{home}.{name}", 2)
    return getattr(importlib.import_module(f"{PACKAGE}.{home}"), name)


def install() -> None:
    """Puts the finder before all others, once: an older installation may still hold the old files."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
