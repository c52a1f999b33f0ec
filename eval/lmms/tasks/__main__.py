"""Prints the folder: ``python -m lmms_eval --include_path "$(python -m mllm_efficient.eval.lmms.tasks)" ...``."""

from . import FOLDER

print(FOLDER)
