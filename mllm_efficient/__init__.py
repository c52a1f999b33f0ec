"""Fewer visual tokens for Hugging Face LLaVA-family models, measured honestly."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from . import moved

# In a source checkout the folders eval/, patches/ and configs/ beside this package are its subpackages.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "patches" / "rules.py").is_file():
    __path__.append(str(_root))

moved.install()

_HOME = {
    "VisualTokens": "tokens", "CompressedTokens": "tokens", "Budget": "budget",
    "Compressor": "compressors.base", "Selector": "compressors.selector", "Merger": "compressors.merger",
    "DivPrune": "compressors.divprune", "DivMerge": "compressors.divmerge",
    "Random": "compressors.random", "Uniform": "compressors.uniform",
    "Pool": "compressors.pool", "Resize": "compressors.resize", "Native": "compressors.native", "NoCompression": "compressors.none",
    "TokenFlex": "compressors.tokenflex", "TokenFlexProjector": "trained.projector", "Projector": "compressors.projector",
    "load": "trained.folder", "Resizer": "compressors.resizer", "encode": "apply.encode", "Encoded": "apply.encode",
    "Layout": "apply.prompt",
    "Reducer": "compressors.reducer", "FastV": "compressors.fastv", "PyramidDrop": "compressors.pyramiddrop",
    "SparseVLM": "compressors.sparsevlm", "Dart": "compressors.dart",
    "DPN": "compressors.dpn", "Proportional": "compressors.proportional", "LayerTokens": "tokens", "ReducedTokens": "tokens",
    "CDPruner": "compressors.cdpruner", "SpatialPyramidPooling": "compressors.spp", "ToMe": "compressors.tome",
    "FlowCut": "compressors.flowcut",
    "PixelPrune": "compressors.pixelprune",
    "FasterVLM": "compressors.fastervlm", "VisPruner": "compressors.vispruner", "VisionZip": "compressors.visionzip",
    "Scope": "compressors.scope", "PruMergePlus": "compressors.prumerge_plus",
    "MMTok": "compressors.mmtok", "ApET": "compressors.apet", "PruneSID": "compressors.prunesid", "OTPrune": "compressors.otprune",
    "Hawk": "compressors.hawk", "VScan": "compressors.vscan",
    "EVS": "compressors.evs", "VidCom2": "compressors.vidcom2", "VCast": "compressors.vcast", "FastVID": "compressors.fastvid",
    "register": "registry", "list_methods": "registry", "get_method": "registry", "build": "registry",
    "builtin": "eval.builtin.sample", "sample": "eval.builtin.sample",
    "evaluate": "eval.api", "sweep": "eval.api", "bench": "eval.api", "flops": "eval.api", "Results": "eval.results",
    "anchor_attention": "patches.anchor", "doctor": "patches.checkup", "Checkup": "patches.checkup",
    "prepare": "apply.prepare", "Prepared": "apply.prepare",
    "wrap": "apply.wrap", "unwrap": "apply.wrap", "compressed": "apply.wrap", "is_wrapped": "apply.wrap",
    "mask_labels": "apply.labels", "from_pretrained": "trained.pretrained",
    "last_report": "report", "CompressionReport": "report", "ImageReport": "report",
    "MllmEfficientError": "errors", "UnknownMethodError": "errors", "BadBudgetError": "errors", "MissingBudgetError": "errors",
    "UnsupportedModelError": "errors", "CountMismatchError": "errors", "AlreadyWrappedError": "errors",
    "NotFiniteError": "errors", "BadSettingError": "errors",
}  # fmt: skip
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    __version__: str

    from .apply.encode import Encoded as Encoded
    from .apply.encode import encode as encode
    from .apply.labels import mask_labels as mask_labels
    from .apply.prepare import Prepared as Prepared
    from .apply.prepare import prepare as prepare
    from .apply.prompt import Layout as Layout
    from .apply.wrap import compressed as compressed
    from .apply.wrap import is_wrapped as is_wrapped
    from .apply.wrap import unwrap as unwrap
    from .apply.wrap import wrap as wrap
    from .budget import Budget as Budget
    from .compressors.apet import ApET as ApET
    from .compressors.base import Compressor as Compressor
    from .compressors.cdpruner import CDPruner as CDPruner
    from .compressors.dart import Dart as Dart
    from .compressors.divmerge import DivMerge as DivMerge
    from .compressors.divprune import DivPrune as DivPrune
    from .compressors.dpn import DPN as DPN
    from .compressors.evs import EVS as EVS
    from .compressors.fastervlm import FasterVLM as FasterVLM
    from .compressors.fastv import FastV as FastV
    from .compressors.fastvid import FastVID as FastVID
    from .compressors.flowcut import FlowCut as FlowCut
    from .compressors.hawk import Hawk as Hawk
    from .compressors.merger import Merger as Merger
    from .compressors.mmtok import MMTok as MMTok
    from .compressors.native import Native as Native
    from .compressors.none import NoCompression as NoCompression
    from .compressors.otprune import OTPrune as OTPrune
    from .compressors.pixelprune import PixelPrune as PixelPrune
    from .compressors.pool import Pool as Pool
    from .compressors.projector import Projector as Projector
    from .compressors.proportional import Proportional as Proportional
    from .compressors.prumerge_plus import PruMergePlus as PruMergePlus
    from .compressors.prunesid import PruneSID as PruneSID
    from .compressors.pyramiddrop import PyramidDrop as PyramidDrop
    from .compressors.random import Random as Random
    from .compressors.reducer import Reducer as Reducer
    from .compressors.resize import Resize as Resize
    from .compressors.resizer import Resizer as Resizer
    from .compressors.scope import Scope as Scope
    from .compressors.selector import Selector as Selector
    from .compressors.sparsevlm import SparseVLM as SparseVLM
    from .compressors.spp import SpatialPyramidPooling as SpatialPyramidPooling
    from .compressors.tokenflex import TokenFlex as TokenFlex
    from .compressors.tome import ToMe as ToMe
    from .compressors.uniform import Uniform as Uniform
    from .compressors.vcast import VCast as VCast
    from .compressors.vidcom2 import VidCom2 as VidCom2
    from .compressors.visionzip import VisionZip as VisionZip
    from .compressors.vispruner import VisPruner as VisPruner
    from .compressors.vscan import VScan as VScan
    from .errors import AlreadyWrappedError as AlreadyWrappedError
    from .errors import BadBudgetError as BadBudgetError
    from .errors import BadSettingError as BadSettingError
    from .errors import CountMismatchError as CountMismatchError
    from .errors import MissingBudgetError as MissingBudgetError
    from .errors import MllmEfficientError as MllmEfficientError
    from .errors import NotFiniteError as NotFiniteError
    from .errors import UnknownMethodError as UnknownMethodError
    from .errors import UnsupportedModelError as UnsupportedModelError
    from .eval.api import bench as bench
    from .eval.api import evaluate as evaluate
    from .eval.api import flops as flops
    from .eval.api import sweep as sweep
    from .eval.builtin.sample import builtin as builtin
    from .eval.builtin.sample import sample as sample
    from .eval.results import Results as Results
    from .patches.anchor import anchor_attention as anchor_attention
    from .patches.checkup import Checkup as Checkup
    from .patches.checkup import doctor as doctor
    from .registry import build as build
    from .registry import get_method as get_method
    from .registry import list_methods as list_methods
    from .registry import register as register
    from .report import CompressionReport as CompressionReport
    from .report import ImageReport as ImageReport
    from .report import last_report as last_report
    from .tokens import CompressedTokens as CompressedTokens
    from .tokens import LayerTokens as LayerTokens
    from .tokens import ReducedTokens as ReducedTokens
    from .tokens import VisualTokens as VisualTokens
    from .trained.folder import load as load
    from .trained.pretrained import from_pretrained as from_pretrained
    from .trained.projector import TokenFlexProjector as TokenFlexProjector


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mllm-efficient")
    except PackageNotFoundError:  # files on PYTHONPATH that nothing installed
        return "0+unknown"


def __getattr__(name: str):
    if name == "__version__":
        globals()[name] = _version()
        return globals()[name]
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
