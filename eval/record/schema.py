"""Every field of the result files and of ``Results``: the one place that says what each means. Docs are generated from it.

``results.json`` of ``eval`` and ``report.json`` of ``sweep``, and what ``--json`` prints, are ``{"rows": [...], "meta": {...}}``;
``samples.jsonl`` has a record a line. A field that was not measured is null. Intervals are [low, high] at 95%.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """kind: its type in JSON. always: whether it is in every record of its file, null where it was not measured."""

    name: str
    kind: str
    meaning: str
    always: bool = True


def _fields(*lines: str) -> dict[str, Field]:
    """``name | kind | meaning``; a question mark behind the name says that not every record has it."""
    out = {}
    for line in lines:
        name, kind, meaning = (part.strip() for part in line.split("|"))
        out[name.rstrip("?")] = Field(name.rstrip("?"), kind, meaning, always=not name.endswith("?"))
    return out


RECORD = _fields(
    "method | string | specification; no-image is the floor: the question without its picture",
    "id | string | of the sample: test/3/count, the id of a request, gqa/17",
    "task | string | category or task; images, text-only of one's own requests",
    "answer | string | what the model answered, for the embedded benchmark its first word; null where it failed",
    "correct | boolean | whether it is right; null where no answer is known",
    "error | string | why there is no answer; null where there is one. Failed samples are asked again when a run resumes",
    "fingerprint | string | hash of everything that the answer depends on besides method and sample",
    "question? | string | as it was asked", "expected? | string, list | the right answer or answers",
    "image? | integer | of the embedded benchmark: which picture, by which intervals are resampled",
    "images? | list | of one's own requests: their paths", "request? | string | hash of all that a request asks",
    "extra? | object | further fields of a user's record, as they came",
    "visual_tokens_full? | integer | visual tokens of the sample's images before compression",
    "visual_tokens_kept? | integer | after it; of methods inside the decoder the layer average, rounded",
    "tokens_per_layer? | list | visual tokens at each decoder layer, of methods inside the decoder",
    "kernels? | list | what dpn's router chose at each stage",
    "positions? | string | keep or renumber: places of kept tokens in the prompt",
    "region_share? | number | share of the kept tokens on what the question is about",
    "region_kept? | number | share of what the question is about that is kept",
    "confidence? | number | geometric mean of the probabilities of the answer's tokens, 0 to 1",
    "text? | string | the whole text, where answer is a part of it",
    "corruption? | string | of its pictures, with --corrupt",
    "turns? | integer | 2: asked as the second of a conversation", "first? | string | the first question of it",
    "first_answer? | string | and its answer",
    "token_ids? | list | of the answer", "exact_match? | boolean | answered to the letter as by the uncompressed model",
    "normalised_match? | boolean | the same apart from case, punctuation, articles and numbers spelled out",
    "first_divergence? | integer | the token at which the answers part; null where they do not",
    "kl? | number | nats, of the next token along the uncompressed model's answer", "baseline_answer? | string | that answer",
)  # fmt: skip
SCORES = _fields(
    "score | number | percent right; agreement in percent or nats (unit); of public tasks percent of the metric's best value",
    "score_interval | pair | over 2,000 resamples of images or requests", "baseline | number | the uncompressed model's score",
    "difference | number | score - baseline, paired, in points", "difference_interval | pair | over resamples; exact where few differ",
    "retention | number | percent of the baseline's score", "n | integer | samples", "clusters | integer | images or requests resampled",
    "failures | integer | samples without an answer, which count as wrong", "floor | number | score without the picture",
    "visual_tokens_full | number | mean over samples, before compression", "visual_tokens_kept | number | after it",
    "positions | string | keep or renumber",
)  # fmt: skip
OVERALL = _fields(
    "micro? | number | percent right of all samples, whatever their category",
    "hard? | number | percent right of the hard_n that the baseline gets right and resize at the same budget wrong",
    "hard_n? | integer | how many those are", "broken? | number | percent wrong of the broken_n that both get right",
    "broken_n? | integer | how many those are", "ece? | number | expected calibration error in percent, lower is better",
    "ece_interval? | pair | over resamples of images", "aurc? | number | area under the risk-coverage curve in percent, lower is better",
    "aurc_interval? | pair | over resamples of images",
)  # fmt: skip
EVALUATE = _fields(
    "method | string | specification; the first rows are none's",
    "keep | number | fraction asked for", "tokens | integer | count asked for",
    "turns | integer | 2: rows of second turns", "task | string | category; overall: the unweighted mean of categories",
    "metric | string | exact_match; of one's own requests the measure of agreement", "unit? | string | percent, tokens or nats",
    "region_share? | number | share of the kept tokens on what the question is about",
    "region_kept? | number | share of what the question is about that is kept",
    "first_turn? | number | of second turns: the method's score on the same questions asked alone",
    "turn_difference? | number | second turn - first, in points", "turn_interval? | pair | of that",
    "corruption? | string | of the pictures, with --corrupt; the baseline is none under the same one",
    "clean? | number | of corrupted pictures: the method's score on them as they are",
    "clean_difference? | number | score - clean, paired, in points", "clean_interval? | pair | of that",
    "against? | string | the method that --against names", "against_difference? | number | score - its score",
    "against_interval? | pair | of that", "by_length? | object | agreement by tokens of the uncompressed model's answer",
) | SCORES | OVERALL  # fmt: skip
COSTS = _fields(
    "vision_tflops | number | 10^12 FLOPs of tower and projector", "compress_tflops | number | of the method",
    "prefill_tflops | number | of the language model over the prompt", "decode_tflops | number | of the tokens after the first",
    "total_tflops | number | of all phases", "flops_ratio | number | total over the baseline's",
)  # fmt: skip
TIMES = _fields(
    "vision_ms | spread | tower and projector: {median, q1, q3, n}", "compress_ms | spread | the method and the removal of placeholders",
    "prefill_ms | spread | the language model over the prompt", "ttft_ms | spread | from pixels in memory to the first token",
    "tpot_ms | spread | each further token", "e2e_ms | spread | to the last token", "tokens_per_s | spread | new tokens over e2e_ms",
    "ttft_ratio | ratio | over the baseline's of the same repeat: {median, low, high}", "e2e_ratio | ratio | the same of e2e_ms",
    "free_choice_reached | ratio | TTFT of random at the same count over this one's",
    "peak_memory_mb | number | 10^6 bytes during generation", "kv_cache_mb | number | keys and values after the last token",
)  # fmt: skip
SWEEP = _fields(
    "method | string | specification", "role | string | baseline, method or reference (random, resize)",
    "asked | string | the budget that was asked for, such as keep=0.25", "keep | number | fraction asked for",
    "tokens | integer | count asked for", "region_share | number | as in eval", "region_kept | number | as in eval",
    "prefill_flops_ratio | number | of prefill alone", "prefill_flops_ratio_asked | number | of a pure token drop at the same budget",
    "kv_cache_mb_computed | number | by closed form", "tasks | object | by category: score to failures as here",
    "bound? | number | lower 95% bound of the difference that decides, for all bound_cells cells at once",
    "bound_cells? | integer | how many cells cost less and could be picked", "failed | string | why the cell failed",
    "metric? | string | of one's own requests: what score is", "agreement? | object | of one's own requests: every measure",
    "by_length? | object | agreement by tokens of the uncompressed model's answer",
) | SCORES | {name: Field(name, f.kind, f.meaning) for name, f in OVERALL.items()} | COSTS | TIMES  # fmt: skip
BENCH = _fields(
    "method | string | specification", "arm | string | baseline, method or reference", "quantization | string | int8 or int4 weights",
    "batch_size | integer | prompts at a time", "preprocess_ms | spread | pictures in memory to model inputs",
    "method_ms | spread | the method's own part of compress_ms or prefill_ms", "visual_tokens_full | integer | of a prompt, before",
    "visual_tokens_kept | integer | after", "flops_ratio | number | the TTFT ratio that the FLOPs allow",
    "ideal_reached | number | flops_ratio over the ratio measured", "failed | string | why there are no times",
    "max_batch? | integer | the largest batch that fits",
) | TIMES  # fmt: skip
FLOPS = _fields(
    "method | string | specification", "convention | string | exact, or a paper's", "text_tokens | number | mean over the prompts",
    "visual_tokens_full | number | before compression", "visual_tokens_kept | number | after it", "separators | number | newline columns",
    "ratio | number | percent, mean of the prompts' ratios", "visual_tokens_per_layer | list | of methods inside the decoder",
    "kv_cache_mb | number | 10^6 bytes after the last token", "measured? | object | what torch's counter says, with --measured",
) | COSTS  # fmt: skip
FILES: Mapping[str, dict[str, Field]] = {
    "samples.jsonl": RECORD, "rows of eval": EVALUATE, "rows of sweep": SWEEP, "rows of bench": BENCH, "rows of flops": FLOPS,
}  # fmt: skip


def markdown() -> str:
    """All of it as Markdown, a table for each file."""
    out = []
    for title, fields in FILES.items():
        out += [f"### {title}", "", "| field | type | meaning |", "|---|---|---|"]
        out += [f"| `{f.name}` | {f.kind} | {f.meaning}{'' if f.always else ' (where it applies)'} |" for f in fields.values()]
        out.append("")
    return "\n".join(out)
