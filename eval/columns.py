"""The columns of all tables, in the words that stand in their headers, and what each means: one glossary for terminal, report and docs."""

from __future__ import annotations

from mllm_efficient.tables import INTERVAL, plain

OF_SCORES = {
    "tokens": "visual tokens kept of a prompt's images, mean over the prompts",
    "score": "percent right, mean of the categories; of public tasks percent of the metric's best value, mean of the tasks",
    "macro": "percent right, unweighted mean of the categories",
    "vs none": "paired difference to the uncompressed model in points",
    "vs baseline": "paired difference to the uncompressed model in points",
    "retention": "percent of the uncompressed model's score",
    "in region": "share of the kept tokens that lie on what the question is about",
    "same answer": "percent of the requests answered exactly as by the uncompressed model",
    "same words": "the same apart from case, punctuation, articles and numbers spelled out",
    "first other token": "where different answers part, mean",
    "KL nats": "of the next token along the uncompressed model's answer",
    "right": "percent of the requests that have an answer",
    "right vs none": "paired difference to the uncompressed model in points",
    "hard": "percent right of the questions that the uncompressed model gets right and the smaller picture of the same budget wrong",
    "broken": "percent wrong of the questions that both get right",
    "ECE": "expected calibration error: how far confidence and accuracy are apart, in percent; lower is better",
    "AURC": "area under the risk-coverage curve, in percent: wrong answers among the most confident; lower is better",
    "2nd turn": "macro mean of the same questions asked second in a conversation, with the tokens chosen for the first",
    "text-only: same": "percent of the requests without an image answered exactly as by the uncompressed model",
}
OF_TASKS = {
    "task": "the benchmark", "metric": "its metric that counts", "value": "the metric as lmms-eval gives it",
    "prompt": "tokens of the prompt after compression, per sample", "n": "samples",
    "neither": "answers to questions of yes or no that are neither", "failed": "samples without an answer, which count as wrong",
}  # fmt: skip
OF_COST = {
    "FLOPs": "percent of the uncompressed model's: tower, projector, method, prefill, decoding",
    "prefill FLOPs": "percent of the uncompressed model's, language model's prefill alone",
    "asked": "prefill FLOPs of a pure token drop at the budget asked for, which --match flops solves for",
    "TTFT ms": "time to first token, median [quartiles]",
    "TTFT/none": "paired ratio to the uncompressed model",
    "prefill ms": "language model over the prompt, median [quartiles]",
    "e2e ms": "to the last token, median [quartiles]",
    "tok/s": "new tokens over the end-to-end time",
    "peak MB": "highest memory during generation, 10^6 bytes",
    "KV MB": "keys and values after the last token, 10^6 bytes",
}
OF_BENCH = {
    "batch": "prompts at a time", "vision": "ms in tower and projector", "compress": "the method's own time in ms, its own TFLOPs in flops",
    "prefill": "language model over the prompt: ms, TFLOPs in flops", "ideal": "the ratio of time to first token that the FLOPs allow",
    "reached": "how much of that speed-up is there", "vs random": "time to first token of a free choice of as many tokens over this one",
    "TPOT": "ms for each token after the first", "max batch": "the largest batch that fits",
}  # fmt: skip
OF_FLOPS = {
    "text": "tokens of the prompt that are not visual", "visual": "visual tokens before compression", "kept": "visual tokens after it",
    "decode": "TFLOPs of the tokens after the first", "total": "TFLOPs of all phases",
    "ratio": "percent of the uncompressed model's, mean over the prompts", "counted": "TFLOPs that torch's counter says",
    "difference": "|counted - closed form| in FLOPs, over all phases and prompts",
}  # fmt: skip
OF_METHODS = {
    "method": "name, or the whole specification", "kind": "pre_llm before the language model, projector in place of the model's own, "
    "in_llm inside the decoder, whose budget is the average over its layers",
    "trained": "whether it has weights of its own", "query-aware": "whether it looks at the question",
    "needs": "what it asks a model for beside the features", "paper": "where it is from",
    "own parameters": "settings beside the budget, with their defaults",
}  # fmt: skip
MEANS = OF_METHODS | OF_SCORES | OF_TASKS | OF_COST | OF_BENCH | OF_FLOPS
BY_COMMAND = {
    "eval": ("method", *OF_SCORES, *OF_TASKS), "bench": ("method", *OF_BENCH, *OF_COST), "flops": ("method", *OF_FLOPS, *OF_BENCH, "KV MB"),
    "sweep": ("method", *OF_SCORES, *OF_COST, *OF_TASKS), "report": ("method", *OF_SCORES, *OF_COST), "methods": tuple(OF_METHODS),
}  # fmt: skip
_PLAIN = {plain(name): meaning for name, meaning in MEANS.items()}


def meaning(header: str) -> str:
    """What a column means; empty for a category or a task, which is named for itself."""
    return _PLAIN.get(plain(header), "")


def without_interval(header: str) -> str:
    return INTERVAL.sub("", header)
