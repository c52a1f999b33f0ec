"""Writes the parts of the documentation that the code knows best: ``python docs/generate.py``.

A page has ``<!-- generated: NAME -->`` and ``<!-- end of NAME -->`` around each; what stands between them is replaced. The pages are
committed, so that they can be read without a build, and a test says when one is out of date.
"""

from __future__ import annotations

import csv
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from mllm_efficient.cli import app
from mllm_efficient.cli.help import EVERYWHERE, EXAMPLES
from mllm_efficient.compressors.base import parameters, query_aware
from mllm_efficient.compressors.words import parameters_of, title_of
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.eval.record import schema
from mllm_efficient.parsing import read_yaml
from mllm_efficient.patches.facts import FACTS, REFUSED
from mllm_efficient.patches.rules import DECODERS, FAMILIES, rules_class
from mllm_efficient.patches.vllm import SERVED
from mllm_efficient.patches.vllm.settings import servable
from mllm_efficient.registry import BUILTIN, build, get_method

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SHARED = ("keep", "tokens", "prune", "min_tokens", "max_tokens", "positions", "per", "newline", "merge")  # described once on the page
KINDS = {"pre_llm": "before the language model", "projector": "in place of the projector", "in_llm": "inside the decoder"}


# ------------------------------------------------------------------------------------------------ Markdown


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def code(text: Any) -> str:
    return f"`{text}`"


def linked(papers: str) -> str:
    """``arXiv 2503.02175, 2505.22654`` with every number a link."""
    return re.sub(r"(?:arXiv )?(\d{4}\.\d{5}|\d{4}\.\d{4})(v\d)?", r"[\1\2](https://arxiv.org/abs/\1\2)", papers)


# ------------------------------------------------------------------------------------------------ methods


def methods_table() -> str:
    served = set(servable())
    rows = []
    for name in BUILTIN:
        cls = get_method(name)
        flags = ["yes" if flag else "" for flag in (query_aware(cls), cls.trained, name in served)]
        rows.append([f"[`{name}`](#{name})", KINDS[cls.kind], *flags, ", ".join(sorted(cls.needs)), linked(cls.paper)])
    return table(["method", "where it works", "looks at the question", "trained", "vLLM", "needs", "source"], rows)


def methods_in_full() -> str:
    """Every method: its docstring, and the settings that it has of its own."""
    parts = []
    for name in BUILTIN:
        cls = get_method(name)
        own = [p for p in parameters_of(cls) if p.name not in SHARED or (p.name == "merge" and p.default is not None)]
        parts += [f"### {name}", f"{title_of(name)}, `me.{cls.__name__}`.", inspect.getdoc(cls) or ""]
        if own:
            rows = [[code(p.name), code(p.shown) if p.shown != "-" else "", p.meaning] for p in own]
            parts += [table(["setting", "default", "meaning"], rows)]
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------ families


def example_of(name: str) -> Any:
    """A method with the fewest settings that it takes."""
    cls = get_method(name)
    known, given = parameters(cls), dict[str, Any]()
    if known.get("keep", 0) is None:
        given = {"ratio": 0.5} if "ratio" in known else {"keep": 0.5}
    if cls.trained:
        given["weights"] = "random"
    if name == "cdpruner":
        given["relevance"] = "llm"
    made = cls(**given)
    return build(["divmerge:keep=0.5", made]) if name == "proportional" else made


@functools.cache
def family_rules() -> dict[str, Any]:
    """The rules of the doctor's tiny model of each family of its own."""
    from transformers import AutoConfig

    tiny = read_yaml(ROOT / "configs" / "doctor.yaml")
    return {kind: rules_class(kind)(kind, AutoConfig.for_model(**given["config"])) for kind, given in tiny.items()}


def families_table() -> str:
    """What each family of its own runs, asked of its rules."""
    methods = {name: example_of(name) for name in BUILTIN}
    rows = []
    for kind, rules in family_rules().items():
        refused = [name for name, method in methods.items() if not runs(method, rules)]
        parts = ", ".join(sorted(rules.parts))
        place = "kept (M-RoPE)" if rules.mrope else "closed up" if rules.positions == "renumber" else "kept"
        rows.append([code(kind), code(FAMILIES[kind][0]), place, parts, ", ".join(map(code, refused)) or "-"])
    return table(["model type", "class of transformers", "positions", "`per=`", "methods that it refuses"], rows)


def runs(method: Any, rules: Any) -> bool:
    try:
        method.check(rules)
    except MllmEfficientError:
        return False
    return True


def facts_table() -> str:
    rows = []
    for name, fact in sorted(FACTS.items()):
        if name in FAMILIES:
            continue
        remarks = [
            "grid of each image in the call" if fact.grids else "",
            f"{fact.mrope} rows of positions" if fact.mrope else "",
            "features in later layers too (deepstack)" if fact.deepstack else "",
            "layers with a state" if fact.recurrent else "",
            "tokens of an image see each other" if fact.bidirectional else "",
            "" if fact.gaps else "no positions to keep",
            f"transformers {'.'.join(map(str, fact.since))} or newer" if fact.since > (5, 19) else "",
            f"not on transformers {'.'.join(map(str, fact.broken))}" if fact.broken else "",
        ]
        rows.append([code(name), "; ".join(filter(None, remarks))])
    return table(["model type", "what is particular"], rows)


def refused_table() -> str:
    return table(["model type", "why it cannot be compressed"], [[code(name), why] for name, why in REFUSED.items()])


def decoders() -> str:
    return ", ".join(map(code, DECODERS))


# ------------------------------------------------------------------------------------------------ commands


def commands() -> str:
    """Every command with its options; those that several commands have stand once, at the end."""
    group: Any = typer.main.get_command(app)
    rows = {
        name: [(panel_of(option), row_of(option)) for option in command.params if shown(option)] for name, command in group.commands.items()
    }
    every = [row for own in rows.values() for _, row in own]
    common = [row for i, row in enumerate(every) if every.count(row) >= 4 and row not in every[:i]]
    parts = [EVERYWHERE.replace("--quiet", "`--quiet`").replace("--traceback", "`--traceback`")]
    for name, command in group.commands.items():
        parts += [f"## {name}", " ".join((command.help or "").split())]
        parts += ["\n".join(["```bash", *EXAMPLES[name], "```"])]
        panels: dict[str, list[list[str]]] = {}
        for panel, row in rows[name]:
            if row not in common:
                panels.setdefault(panel, []).append(row)
        parts += [table([panel, "default", "meaning"], lines) for panel, lines in panels.items()]
        shared = [row[0] for row in common if row in [own for _, own in rows[name]]]
        if shared:
            parts += [f"And, [of those that several commands have](#options-of-several-commands): {', '.join(shared)}."]
    return "\n\n".join([*parts, "## Options of several commands", table(["option", "default", "meaning"], common)])


def shown(option: Any) -> bool:
    return option.name != "help" and not getattr(option, "hidden", False)


def panel_of(option: Any) -> str:
    return getattr(option, "rich_help_panel", None) or "option"


def row_of(option: Any) -> list[str]:
    names = " ".join(option.opts) if option.opts[0].startswith("-") else str(option.metavar or option.name).upper()
    has_default = isinstance(option.default, (str, int, float)) and option.default is not False
    return [
        code(names),
        code(option.default) if has_default else "",
        " ".join((getattr(option, "help", None) or "").split()).replace("<", "&lt;"),
    ]


# ------------------------------------------------------------------------------------------------ results


def every_method() -> str:
    """The table of ``benchmarks/results/methods.csv``: accuracy and the paired difference with its interval at four budgets."""
    budgets = (72, 36, 18, 9)
    found: dict[str, dict[int, str]] = {}
    draws: dict[int, list[float]] = {}
    order: dict[str, float] = {}
    with (ROOT / "benchmarks" / "results" / "methods.csv").open() as file:
        for row in csv.DictReader(file):
            if row["role"] == "baseline":
                continue
            name, settings = row["method"].split(":", 1)
            kept, keep = round(float(row["visual_tokens_kept"])), float(re.findall(r"keep=([\d.]+)", settings)[0])
            at = budgets[(0.5, 0.25, 0.125, 0.0625).index(keep)]
            if name == "random":
                draws.setdefault(at, []).append(float(row["score"]))
                continue
            own = ",".join(part for part in settings.split(",") if not part.startswith("keep="))
            label = name + (f" (`{own}`)" if own else "")
            low, high = (float(row[f"difference_interval_{end}"]) for end in ("low", "high"))
            fewer = f" ({kept})" if kept != at else ""
            found.setdefault(label, {})[at] = f"{float(row['score']):.1f}, {float(row['difference']):+.1f} [{low:+.1f}, {high:+.1f}]{fewer}"
            order[label] = order.get(label, 0) + float(row["score"])
    found["random"] = {at: f"{sum(s) / len(s):.1f} ({min(s):.1f}-{max(s):.1f})" for at, s in draws.items()}
    order["random"] = sum(sum(s) / len(s) for s in draws.values())
    rows = [[label, *(found[label][at] for at in budgets)] for label in sorted(found, key=lambda label: -order[label])]
    return table(["", *(f"{at} tokens" for at in budgets)], rows)


def all_flops() -> str:
    """Of ``benchmarks/results/towers.csv``: shares of all FLOPs and of the tower's, accuracy and its difference, cheapest last."""
    with (ROOT / "benchmarks" / "results" / "towers.csv").open() as file:
        found = sorted(csv.DictReader(file), key=lambda row: -float(row["flops_ratio"]))
    whole, rows = found[0], []
    for row in found:
        tower = float(row["vision_tflops"]) / float(whole["vision_tflops"])
        low, high = (float(row[f"difference_interval_{end}"]) for end in ("low", "high"))
        against = "" if row["role"] == "baseline" else f"{float(row['difference']):+.1f} [{low:+.1f}, {high:+.1f}]"
        kept = f"{float(row['visual_tokens_kept']):.0f}"
        rows.append(
            [
                f"`{row['method']}`",
                kept,
                f"{100 * float(row['flops_ratio']):.0f}%",
                f"{100 * tower:.0f}%",
                f"{float(row['score']):.1f}",
                against,
            ]
        )
    return table(["", "tokens", "of all FLOPs", "of the tower's", "right", "difference"], rows)


# ------------------------------------------------------------------------------------------------ README

NAMES = {
    "llava": "LLaVA-1.5", "llava_next": "LLaVA-NeXT", "llava_next_video": "LLaVA-NeXT-Video", "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL", "qwen3_5": "Qwen3.5", "qwen3_5_moe": "Qwen3.5-MoE",
    "internvl": "InternVL", "cohere2_vision": "Cohere2 Vision", "glm46v": "GLM-4.6V", "glm4v": "GLM-4.1V", "glm4v_moe": "GLM-4.5V",
    "glm_ocr": "GLM-OCR", "gemma3": "Gemma 3", "gemma4": "Gemma 4", "mistral3": "Mistral 3", "lighton_ocr": "LightOnOCR",
    "idefics3": "Idefics3", "smolvlm": "SmolVLM", "minicpmv4_6": "MiniCPM-V 4.6", "minicpmv4_7": "MiniCPM-V 4.7", "llama4": "Llama 4",
}  # fmt: skip


def support_table() -> str:
    """What runs on which family of its own; families that are alike share a row."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for kind, rules in family_rules().items():
        tried = ("divprune:keep=0.5", "fastervlm:keep=0.5", "fastv:ratio=0.5,layer=2", "tokenflex:tokens=4,weights=random")
        cells = ["yes" if runs(build(specification), rules) else "" for specification in tried]
        served = "yes" if FAMILIES[kind][0] in SERVED else ""
        alike.setdefault((*cells, "yes" if "frame" in rules.parts else "", served), []).append(NAMES.get(kind, kind))
    header = ("family", "before the language model", "by the tower's attention", "inside the decoder", "trained projector", "video", "vLLM")
    return table(header, [[", ".join(names), *cells] for cells, names in alike.items()])


def speed_table() -> str:
    ttft, vllm = (json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"] for name in ("cpu-ttft", "cpu-vllm"))

    def times(ratio: dict[str, float], slower: bool) -> str:
        """How many times as fast, with its interval, of a ratio of times or of rates."""
        values = [ratio["median"], ratio["low"], ratio["high"]]
        middle, *ends = [1 / v for v in values] if slower else values
        return f"{middle:.1f}x [{min(ends):.1f}, {max(ends):.1f}]"

    rows = []
    for name in ("divprune", "resize"):
        (row,) = [r for r in ttft if r["method"] == f"{name}:tokens=57"]
        (server,) = [r for r in vllm if r["method"] == f"{name}:tokens=64"]
        first, whole = times(row["ttft_ratio"], True), times(row["e2e_ratio"], True)
        kept = f"{code(name)}, {row['visual_tokens_kept']} and {server['visual_tokens_kept']} of 576 tokens"
        rows.append([kept, first, f"{1 / row['flops_ratio']:.1f}x", whole, times(server["requests_ratio"], False)])
    return table(["", "to the first token", "what the FLOPs would allow", "with 8 tokens of answer", "requests per second with vLLM"], rows)


# ------------------------------------------------------------------------------------------------ pages

PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "../README.md": {"speed": speed_table, "support": support_table},
    "evaluate.md": {"schema": schema.markdown},
    "methods.md": {"table": methods_table, "methods": methods_in_full},
    "families.md": {"families": families_table, "facts": facts_table, "refused": refused_table, "decoders": decoders},
    "cli.md": {"commands": commands},
    "results.md": {"every method": every_method, "all FLOPs": all_flops},
}


def written(page: str) -> str:
    """A page as it should be."""
    text = (DOCS / page).read_text()
    for name, make in PARTS[page].items():
        start, end = f"<!-- generated: {name} -->\n", f"\n<!-- end of {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise SystemExit(f"docs/{page} must have one {start.strip()} and one {end.strip()}")
        text = text[: text.index(start) + len(start)] + "\n" + make() + "\n" + text[text.index(end) :]
    return text


if __name__ == "__main__":
    for page in PARTS:
        (DOCS / page).write_text(written(page))
