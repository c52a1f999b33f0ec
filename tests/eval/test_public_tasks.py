"""Public tasks on small data sets: right answers get full marks, wrong ones nothing, and ours measure what the stock ones do not."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import inspect
import random
import shutil
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from mllm_efficient import stats
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.eval.lmms.scores import RIGHT, clustered, known, neither, sample_score, top_of

from ..public_data import ABSURD, FIXTURES, STOCK, captions_of, make, right_answer, wrong_answer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval: make test-integration")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="caption metrics need Java")

CAPTIONS = ["coco2017_cap_val", "flickr30k_test"]
TASKS = [task for task in (*FIXTURES, *STOCK) if task not in CAPTIONS]
# What of a metric's top a fixture can reach: two of MME's ten categories of perception, four of OCRBench's 1,000 samples.
REACHED = {"mme": 400 / 2000, "me_mme": 400 / 2000, "ocrbench": 4 / 1000}


@dataclass
class Outcome:
    """An evaluation: the metrics, lmms-eval's log of the samples, and what was asked."""

    values: dict[str, Any]
    samples: list[dict[str, Any]]
    asked: list[Any]

    def scores(self, metric: str) -> list[float | None]:
        return [sample_score(s[metric]) for s in self.samples if metric in s]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    root, cache = tmp_path_factory.mktemp("data"), str(tmp_path_factory.mktemp("cache"))
    make(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", cache)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        from mllm_efficient.eval.lmms.host import Host

        yield Host(root)


@pytest.fixture(scope="module")
def ask(host, tmp_path_factory):
    """``ask(task, answer)``: an evaluation of a model that says ``answer(task, sample)``."""

    def evaluate(task, answer, limit=None) -> Outcome:
        model = scripted(answer)
        result = host.evaluate(model, task, limit=limit, batch_size=1, files=tmp_path_factory.mktemp("files"))
        values = {name.split(",")[0]: value for name, value in result["results"][task].items()}
        return Outcome(values, result["samples"][task], model.asked)

    return evaluate


@pytest.fixture(scope="module")
def once(ask):
    """``ask``, whose evaluations are kept."""
    return functools.cache(ask)


def scripted(answer) -> Any:
    import torch
    from lmms_eval.api.model import lmms

    from mllm_efficient.eval.lmms.adapter import content_of

    class Scripted(lmms):
        """Sees the whole sample, and reads its images as the adapter does."""

        is_simple = False
        loglikelihood = generate_until_multi_round = None

        def __init__(self):
            super().__init__()
            self.device, self.asked = torch.device("cpu"), []

        def generate_until(self, requests):
            answers = []
            for request in requests:
                _, messages_of, _, doc_id, task, split = request.args
                doc = self.task_dict[task][split][doc_id]
                self.asked.append(content_of(messages_of(doc), f"{task}/{doc_id}"))
                answers.append(answer(task, doc))
            return answers

    return Scripted()


def always(text):
    return lambda task, doc: text


def metrics(outcome, *names) -> list[float]:
    return [outcome.values[name] for name in names]


# ------------------------------------------------------------------------------------------------------- every task


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_get_full_marks(task, once):
    entry = known()[task]
    share = once(task, right_answer).values[entry.metric] / entry.top.get(entry.metric, 1)
    assert share == pytest.approx(REACHED.get(task, 1), abs=1e-9)


@pytest.mark.parametrize("task", TASKS)
def test_wrong_answers_get_nothing(task, once):
    assert once(task, wrong_answer).values[known()[task].metric] == 0


@pytest.mark.parametrize("task", TASKS)
def test_a_second_evaluation_gives_the_same(task, once, ask):
    first, _ = once(task, right_answer), once(task, wrong_answer)
    second = ask(task, right_answer)
    assert second.values == first.values
    assert [c.messages for c in second.asked] == [c.messages for c in first.asked]


@pytest.mark.parametrize("task", TASKS)
def test_scores_of_samples_say_what_is_right(task, once):
    metric = known()[task].metric
    right, wrong = once(task, right_answer).scores(metric), once(task, wrong_answer).scores(metric)
    assert len(right) == len(wrong) > 0
    assert all(s > RIGHT for s in right) and all(s <= RIGHT for s in wrong)


@pytest.mark.parametrize("task", TASKS)
def test_every_sample_is_asked_with_its_images(task, once):
    asked = once(task, right_answer).asked
    shown = [len(content.pictures) for content in asked]
    expected = {"scienceqa_img": [1, 1, 1, 0], "mmmu_val": [1, 2, 1, 1, 1], "seedbench": [1, 1, 1, 1, 2]}
    assert shown == expected.get(task, [1] * len(asked)) and len(asked) >= 4


# ------------------------------------------------------------------------------------- samples against the metric

STYLES = {
    "right": lambda doc, right, wrong: right,
    "lower case": lambda doc, right, wrong: right.lower(),
    "with a period": lambda doc, right, wrong: f"{right}.",
    "a sentence": lambda doc, right, wrong: f"It is a {right}.",
    "in brackets": lambda doc, right, wrong: f"The answer is ({right})",
    "the option's words": lambda doc, right, wrong: str(doc.get(right, doc.get(f"choice_{right.lower()}", right))),
    "none": lambda doc, right, wrong: "none",
    "by halves": lambda doc, right, wrong: right if len(str(doc["question"])) % 2 else wrong,
}
SUMS = ("me_pope", "me_mme", "pope", "mme")  # metrics that are no mean of their samples


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("task", TASKS)
def test_scores_of_samples_come_to_the_metric(task, style, host, tasks, tmp_path):
    """Scored by the task itself: its metric is that of the samples' scores, or its own aggregation over resamples."""
    found, docs = tasks(task, style if task == "ocrbench" else None)  # whose module adds up all it is ever shown
    metric = known()[task].metric
    kept = [_kept(found, task, doc, style) for doc in docs]
    items = [k[metric] for k in kept if metric in k]
    aggregate = found.aggregation()[metric]
    more = {"args": SimpleNamespace(output_path=str(tmp_path))} if "args" in inspect.signature(aggregate).parameters else {}
    value = float(aggregate(items, **more))
    top = top_of(task, metric, value, [sample_score(i) for i in items])
    parts = clustered(aggregate, items, range(len(items)), value, top)
    assert parts.why is None or (task in SUMS and parts.drawn is None)
    if task not in SUMS:
        assert parts.drawn is None and sum(parts.right) / sum(parts.asked) * top == pytest.approx(value, abs=1e-4)
    elif parts.drawn is not None:
        assert len(parts.drawn) == stats.RESAMPLES and min(parts.drawn) <= value <= max(parts.drawn)


def _kept(found, task, doc, style):
    random.seed(0)  # MMMU guesses
    said = STYLES[style](doc, right_answer(task, doc), wrong_answer(task, doc))
    return found.process_results(copy.deepcopy(doc), [said])


@pytest.fixture(scope="module")
def tasks(host):
    """``tasks(name, of)``: lmms-eval's task and its samples, loaded once for each pair."""

    @functools.cache
    def load(name, of):
        found = host._load(name)
        return found, list(found.eval_docs)

    return load


@pytest.mark.parametrize("said", ["cat", "It is a dog.", "a", "b", "none", "A.", "The answer is B"])
def test_mmbench_reads_letters_then_words_of_options_then_what_the_extractor_finds(said):
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    options = {"A": "cat", "B": "dog", "C": "none", "D": "nan"}
    item = {"index": 1, "answer": "B", "prediction": said, "category": "x", "L2-category": "y", **options}
    right, _, _ = MMBench_Evaluator().eval_result([item], eval_method="static")
    assert sample_score(item) == right


def test_one_discordant_answer_does_not_take_the_interval_away():
    items = [
        {"index": i, "answer": "B", "prediction": "B" if i else "dog", "A": "cat", "B": "dog", "C": "nan", "D": "nan"} for i in range(400)
    ]
    parts = clustered(None, items, range(400), 100.0, 100.0)
    assert parts.why is None and sum(parts.right) == 400


def test_answers_that_are_neither_yes_nor_no_are_counted():
    assert neither(["Yes", "yes, there is", "No.", "None", "Nope", "Not sure", "The answer is no", ""]) == 5


def test_vqav2_without_answer_ids_is_refused(tmp_path, monkeypatch):
    from mllm_efficient.eval.lmms.host import Host

    from .. import public_data

    fixture = FIXTURES["vqav2_val"]
    rows = [{**r, "answers": [{"answer": a["answer"], "answer_confidence": "yes"} for a in r["answers"]]} for r in fixture.rows()]
    monkeypatch.setitem(public_data.FIXTURES, "vqav2_val", dataclasses.replace(fixture, rows=lambda: rows))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make(tmp_path, ["vqav2_val"])
    with pytest.raises(MllmEfficientError, match="task vqav2_val: its answers have no answer_id"):
        Host(tmp_path).check("vqav2_val")


# --------------------------------------------------------------------------------------------------- single answers


@pytest.mark.parametrize(
    "answer, said",
    [
        ("12.5", "12.5"), ("5", "5"), ("5", "The answer is 5."), ("5", "15"), ("5", "five"), ("1,200", "1200"), ("0.333", "0.33"),
        ("blue", "Blue"), ("blue", "a blue bird"), ("blue", "It is light blue."), ("blue", "red"), ("x", "x"), ("x", "xylophone"),
    ],
)  # fmt: skip
def test_an_open_answer_of_mmmu_counts_as_mmmu_counts_it(answer, said, host):
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu, mmmu_process_results

    doc = {"id": "validation_Art_1", "question_type": "open", "options": "[]", "answer": answer}
    kept = mmmu_process_results(doc, [said])["mmmu_acc"]
    assert sample_score(kept) == evaluate_mmmu([kept])[1]["acc"]


def test_a_caption_has_no_score_of_its_own(host):
    from lmms_eval.tasks.coco_cap.utils import coco_process_result
    from lmms_eval.tasks.flickr30k.utils import flickr_process_result

    given = captions_of(0)
    coco = coco_process_result({"question_id": "000000000001.jpg", "id": 1, "answer": given}, given[:1])
    flickr = flickr_process_result({"img_id": "1", "caption": given}, given[:1])
    assert sample_score(coco["coco_CIDEr"]) is None and sample_score(flickr["flickr_CIDEr"]) is None


@pytest.mark.slow
@needs_java
@pytest.mark.parametrize("task", CAPTIONS)
def test_captions(task, ask):
    kind = known()[task].metric.removesuffix("CIDEr")
    names = [kind + name for name in ("Bleu_4", "METEOR", "ROUGE_L", "CIDEr")]
    *others, cider = metrics(ask(task, right_answer), *names)
    assert others == pytest.approx([1, 1, 1], abs=1e-6) and 9 < cider <= 10
    assert metrics(ask(task, wrong_answer), *names) == pytest.approx([0, 0, 0, 0], abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- POPE


@pytest.mark.parametrize("said, ratio", [("yes", 1.0), ("no", 0.0)])
def test_yes_ratio_is_of_what_the_model_says(said, ratio, ask):
    assert metrics(ask("me_pope", always(said)), "yes_ratio", "accuracy") == [ratio, 0.5]
    # The stock metric is of the right answers.
    assert ask("pope", always(said)).values["pope_yes_ratio"] == 0.5


def test_f1_of_pope_is_the_mean_of_its_categories(ask):
    def answer(task, doc):
        return {"adversarial": doc["answer"], "popular": "yes", "random": "no"}[doc["category"]]

    outcome = ask("me_pope", answer)
    assert metrics(outcome, "f1_adversarial", "f1_popular", "f1_random") == pytest.approx([1, 2 / 3, 0])
    assert metrics(outcome, "f1", "accuracy", "yes_ratio") == pytest.approx([5 / 9, 4 / 6, 3 / 6])
    assert ask("pope", answer).values["pope_f1_score"] == pytest.approx(2 / 3)  # of all samples together


def test_pope_reads_the_first_word(ask):
    assert metrics(ask("me_pope", always("Yes.")), "yes_ratio", "neither_ratio", "accuracy") == [1, 0, 0.5]
    assert metrics(ask("me_pope", always("maybe")), "yes_ratio", "neither_ratio", "accuracy", "f1") == [0, 1, 0, 0]


# ----------------------------------------------------------------------------------------------- GQA, TextVQA, MME


def test_gqa_without_copies_of_images_asks_the_same(once, ask):
    stock, own = once("gqa", right_answer), once("me_gqa", right_answer)
    assert [c.messages for c in own.asked] == [c.messages for c in stock.asked]
    pixels = [[(p.size, p.tobytes()) for c in outcome.asked for p in c.pictures] for outcome in (own, stock)]
    assert pixels[0] == pixels[1] and len(set(pixels[0])) == 3

    def half(task, doc):
        return doc["answer"].upper() + "." if doc["id"] in ("q0", "q3") else ABSURD

    assert ask("me_gqa", half).values["exact_match"] == ask("gqa", half).values["exact_match"] == pytest.approx(2 / 6)


def test_ocr_tokens_are_in_our_prompt_only(once):
    stock, own = once("textvqa_val", right_answer), once("me_textvqa_ocr", right_answer)
    assert all("Reference OCR token: " in str(c.messages) and "STOP" in str(c.messages) for c in own.asked)
    assert not any("Reference OCR token" in str(c.messages) for c in stock.asked)


def test_mme_of_every_category(once):
    assert metrics(once("mme", right_answer), "mme_perception_score", "mme_cognition_score") == [400, 200]
    names = ("perception", "cognition", "existence", "OCR", "code_reasoning")
    assert metrics(once("me_mme", right_answer), *names) == [400, 200, 200, 200, 200]


@pytest.mark.parametrize("seed", range(4))
def test_mme_scores_as_the_stock_task(seed, ask):
    def coin(task, doc):
        return random.Random(f"{seed} {doc['question']}").choice(["Yes", "No"])

    own, stock = ask("me_mme", coin), ask("mme", coin)
    assert metrics(own, "perception", "cognition") == metrics(stock, "mme_perception_score", "mme_cognition_score")


def test_mme_leaves_out_a_question_without_its_partner(ask):
    outcome = ask("me_mme", right_answer, limit=3)
    assert len(outcome.samples) == 3 and outcome.values["perception"] == 200
    with pytest.raises(MllmEfficientError, match="task mme: AssertionError: MME only supports pairwise evaluation"):
        ask("mme", right_answer, limit=3)


@pytest.mark.parametrize("task, limit, categories", [("me_pope", 6, 3), ("me_mme", 4, 2)])
def test_a_limit_takes_some_of_each_category(ask, task, limit, categories):
    """The categories take turns; what belongs to one question stays together, and all samples are still there without a limit."""
    found = ask(task, right_answer, limit=limit).samples
    asked = [s["doc"]["category"] for s in sorted(found, key=lambda s: s["doc_id"])]
    assert len(set(asked)) == categories and len(asked) == limit
    if task == "me_mme":
        questions = [s["doc"]["question_id"] for s in sorted(found, key=lambda s: s["doc_id"])]
        assert questions[0] == questions[1] != questions[2] == questions[3]
    assert len(ask(task, right_answer).samples) == len(ask(task.removeprefix("me_"), right_answer).samples)
