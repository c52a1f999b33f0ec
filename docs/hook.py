"""For mkdocs: files of the repository that pages link to, such as ``../benchmarks/README.md``, are part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)")
FOLDER = "repository"


def on_files(files: Any, config: Any) -> Any:
    """Adds every file outside docs/ that a page links to, as it is. One that is missing stays a broken link, which ends the build."""
    found = {path for page in list(files.documentation_pages()) for path in OUTSIDE.findall(page.content_string)}
    for path in sorted(found):
        if (ROOT / path).is_file():
            name = path + ".txt" if path.endswith(".md") else path  # as it is, not as a page
            files.append(File.generated(config, f"{FOLDER}/{name}", content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(lambda m: f"]({FOLDER}/{m[1]}{'.txt' if m[1].endswith('.md') else ''}", markdown)
