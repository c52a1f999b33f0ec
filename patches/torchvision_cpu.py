"""Lets torchvision's CUDA build be imported beside a CPU build of torch.

The wheel that package indexes hold for Linux is the CUDA build. Beside a CPU-only torch its library does not load, and
``import torchvision`` stops at operators that were then never declared; with it stop transformers, lmms-eval and vLLM. Its
image operations need none of that. ``declare`` declares the operators, which leaves them without an implementation.

``python -m mllm_efficient.patches.torchvision_cpu`` does it for every program of the environment, such as ``python -m lmms_eval``;
this package's own commands do it themselves.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OPERATORS = ("nms", "qnms")
FILE = "zz_mllm_efficient_torchvision.pth"  # behind the one that an editable install has
_kept: list[Any] = []  # the declarations, which end with their library


def declare() -> None:
    """Declares what torchvision expects, if its build is one for CUDA, it has not been imported yet and torch has no CUDA."""
    if _kept or "torchvision" in sys.modules or not _built_for_cuda():
        return
    import torch

    if _kept or torch.version.cuda is not None:  # looking for torchvision may have declared through ``at_import``
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def _built_for_cuda() -> bool:
    """Whether an installed torchvision says so in its ``version.py``, which is read, not run."""
    spec = find_spec("torchvision")
    file = None if spec is None or spec.origin is None else Path(spec.origin).with_name("version.py")
    return file is not None and file.is_file() and re.search(r"^__version__ = .*\+cu\d", file.read_text(), re.MULTILINE) is not None


class _Before(MetaPathFinder):
    """Declares when torchvision is about to be imported; finds nothing itself."""

    done = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision" and not self.done:
            self.done = True
            declare()


def install() -> Path:
    """Makes every Python of this environment do ``at_import`` when it starts, for programs that are not ours; where that is written."""
    file = Path(sysconfig.get_paths()["purelib"]) / FILE
    name = __spec__.name if __spec__ else __name__
    there = f"importlib.util.find_spec({name.split('.')[0]!r})"  # it may have been uninstalled since
    file.write_text(f"import importlib.util; {there} and __import__({name!r}, fromlist=['x']).at_import()\n")
    return file


def at_import() -> None:
    """Declares as soon as somebody imports torchvision; costs nothing until then."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _Before) for f in sys.meta_path):
        sys.meta_path.insert(0, _Before())


if __name__ == "__main__":
    print(f"torchvision can be imported without CUDA from now on ({install()}; delete that file to undo it)")
