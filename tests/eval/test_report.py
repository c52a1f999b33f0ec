"""The report of a sweep: recommendation, tables, formats, merging, and a page that opens offline."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mllm_efficient.cli import main
from mllm_efficient.eval.agreement_rows import cell_of
from mllm_efficient.eval.report import plots
from mllm_efficient.eval.report.formats import csv_text
from mllm_efficient.eval.report.merge import Finished
from mllm_efficient.eval.report.page import page
from mllm_efficient.eval.report.recommend import recommend
from mllm_efficient.eval.report.rows import failures, main_table, row_of, task_table
from mllm_efficient.measure.flops import cost

PIXEL = "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAP//////////////////////////////////////////////////////////////////////////////////////wAALCAABAAEBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAA//EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8AN//Z"  # noqa: E501
NASTY = '<img src="http://example.org/x.png" onerror=alert(1)> & "quotes"'


def row(method: str, score: float, *, low: float = 0.0, asked: str = "", ttft: float | None = 1.0, failed: str | None = None) -> dict:
    """A row of a sweep with two categories; ``low`` is the lower end of the paired interval."""
    base = 90.0
    half = {"score": score, "score_interval": [score - 2, score + 2], "baseline": base, "difference": score - base}
    half |= {"difference_interval": [low, score - base + 1], "retention": 100 * score / base, "floor": 30.0, "n": 50, "failures": 0}
    total = {**half, "keep": 1.0, "tokens": None, "micro": score, "visual_tokens_full": 144.0, "positions": "renumber"}
    price = cost("builtin", method=method, new_tokens=4)
    total |= {"visual_tokens_kept": float(price.visual_tokens_kept), "region_share": 0.1, "region_kept": 0.5}
    worse = {**half, "difference": score - base - 4 * (method != "none")}
    spread = {"median": 10.0, "q1": 9.0, "q3": 12.0, "n": 3}
    timed = dict.fromkeys(("vision_ms", "compress_ms", "prefill_ms", "ttft_ms", "tpot_ms", "e2e_ms", "tokens_per_s"), spread)
    timed |= {"ttft_ratio": {"median": ttft, "low": 0.9 * (ttft or 1), "high": 1.1 * (ttft or 1), "n": 3}, "peak_memory_mb": 400.5}
    role = "baseline" if method == "none" else "method"
    by_task = {"count": half, "reading": worse, "overall": total}
    bench = timed if ttft is not None else None
    return row_of(method, role, asked, by_task, price, cost("builtin", new_tokens=4), price.prefill, bench, failed)


def rows() -> list[dict]:
    return [
        row("none", 90.0),
        row("divprune:keep=0.5", 89.8, low=-0.6, asked="keep=0.5", ttft=0.8),
        row("random:keep=0.5", 88.0, low=-3.0, asked="keep=0.5", ttft=0.78),
        row("divprune:keep=0.25", 85.0, low=-6.0, asked="keep=0.25", ttft=0.6),
        row("random:keep=0.25", 84.0, low=-7.0, asked="keep=0.25", ttft=0.59, failed="3 of 50 answers failed: Oops: <b>"),
    ]


def meta(**changes) -> dict:
    out = {
        "command": f"mllm-efficient sweep --import '{NASTY}'", "model": "builtin", "weights": "abc", "suite": "builtin", "split": "test",
        "questions": 100, "images": 20, "questions_fingerprint": "f00", "device": "cpu", "dtype": "float32", "attention": "sdpa",
        "image_processor": "P", "quantization": None, "seed": 0, "max_drop": 1.0, "budget_shown": "keep=0.25",
        "versions": {"mllm_efficient": "0", "python": "3", "torch": "2", "transformers": "5", "numpy": "2", "pillow": "1"},
        "workload": {"text_tokens": 64}, "bench": None, "left_out": {"resize:keep=0.5": NASTY}, "meaning": {"score": "percent right"},
    }  # fmt: skip
    return out | changes


def finish(folder: Path, the_rows: list[dict], **changes) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"rows": the_rows, "meta": meta(**changes)}))
    shown = [{"method": "divprune:keep=0.25", "kept": 36, "full": 144, "answer": NASTY, "correct": False, "views": [PIXEL]}]
    sample = {"id": "test/1/count", "task": "count", "question": NASTY, "expected": "2", "original": PIXEL, "methods": shown}
    (folder / "pictures.json").write_text(json.dumps({"budget": "keep=0.25", "samples": [sample]}))
    return folder


def own(method: str, same: float, low: float, right: float | None = None, right_low: float = 0.0, *, n: int = 200, answered: int = 200):
    """A row of a user's own requests: ``same`` percent in the same words, ``right`` percent right of the ``answered`` of n."""

    def measure(score: float, low: float, base: float, n: int) -> dict:
        half = {"score": score, "score_interval": [base + low, score + 1], "baseline": base, "difference": score - base}
        return half | {"difference_interval": [low, score - base + 1], "retention": score, "floor": None, "n": n, "failures": 0}

    found = {m: measure(same, low, 100.0, n) for m in ("exact_match", "normalised_match")}
    found["kl"] = measure((100 - same) / 50, 0.0, 0.0, n)
    if right is not None:
        found["accuracy"] = measure(right, right_low, 90.0, answered)
    price = cost("builtin", method=method, new_tokens=4)
    about = {"keep": 1.0, "tokens": None, "visual_tokens_full": 144.0, "visual_tokens_kept": float(price.visual_tokens_kept)}
    rows = [{"method": method, "metric": m, "task": "accuracy" if m == "accuracy" else "agreement", **about, **r} for m, r in found.items()]
    role = "baseline" if method == "none" else "method"
    base = cost("builtin", new_tokens=4)
    return row_of(method, role, "", cell_of(rows), price, base, price.prefill, None, None)


def own_rows(right: bool = False, answered: int = 200) -> list[dict]:
    """Two cells: one that keeps its agreement, and a cheaper one that does not but stays as right."""
    given = {"answered": answered}
    return [
        own("none", 100.0, 0.0, 90.0 if right else None, **given),
        own("divprune:keep=0.5", 99.5, -0.9, 88.0 if right else None, -3.0, **given),
        own("divprune:keep=0.25", 90.0, -14.0, 90.0 if right else None, -0.5, **given),
    ]


def own_meta(**changes) -> dict:
    """Of requests whose answers differ: one with a picture, one whose picture is gone, one with more pictures than are shown."""
    return {"suite": "data", "data": NASTY, "split": None, "with_answer": 0, "text_only": 0, "left_out": {}, "worst": []} | changes


def apart(name: str, kl: float | None, *images: object, method: str = "divprune:keep=0.5", **more) -> dict:
    """An entry of ``worst``."""
    entry = {"method": method, "id": name, "question": NASTY, "images": [str(i) for i in images], "expected": [NASTY], "kl": kl}
    return entry | {"first_divergence": 0, "baseline_answer": f"{name} in full", "answer": NASTY, "error": None} | more


def fails(capsys, *argv: object) -> str:
    assert main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1, (out, err)
    return err


# ------------------------------------------------------------------------------------------------ recommendation


def test_the_cheapest_cell_within_the_drop_is_recommended():
    chosen = recommend(rows(), 1.0)
    assert chosen["method"] == "divprune:keep=0.5" and chosen["ttft_ratio"] == 0.8
    assert chosen["hurts"] == {"task": "reading", "difference": pytest.approx(-4.2), "interval": [-0.6, pytest.approx(0.8)]}
    assert "divprune:keep=0.5" in chosen["line"] and "TTFT ratio 0.800" in chosen["line"] and "hurts reading most" in chosen["line"]


def test_none_is_a_legal_recommendation_and_names_what_comes_nearest():
    chosen = recommend(rows(), 0.5)
    assert chosen["method"] == "none" and chosen["nearest"] == "divprune:keep=0.5" and chosen["hurts"] is None
    assert chosen["line"].startswith("keep the uncompressed model: ") and chosen["rule"] == "at most 0.5 points lost"


def test_a_failed_cell_is_never_recommended_and_fewer_flops_win():
    assert recommend(rows(), 50)["method"] == "divprune:keep=0.25"


def test_equal_flops_are_decided_by_time():
    two = [row("none", 90.0), row("random:keep=0.5", 90.0, ttft=0.9), row("uniform:keep=0.5", 90.0, ttft=0.7)]
    assert recommend(two, 1)["method"] == "uniform:keep=0.5"


def test_what_keeps_everything_does_not_beat_none():
    assert recommend([row("none", 90.0), row("random:keep=1", 90.0, ttft=0.5)], 1)["method"] == "none"


def test_a_model_that_needs_no_image_gets_no_recommendation():
    blind = rows()
    blind[0]["floor"] = 90.0
    assert recommend(blind, 50)["method"] == "none" and "no better than without the image" in recommend(blind, 50)["line"]


def test_a_sweep_without_timings_recommends_by_flops():
    chosen = recommend([row("none", 90.0, ttft=None), row("random:keep=0.5", 90.0, ttft=None)], 1)
    assert chosen["method"] == "random:keep=0.5" and chosen["ttft_ratio"] is None and "TTFT not measured" in chosen["line"]


def test_without_answers_the_lower_bound_of_agreement_decides():
    chosen = recommend(own_rows(), 1)
    assert chosen["method"] == "divprune:keep=0.5" and chosen["rule"] == "at least 99% answered in the uncompressed model's words"
    assert "99.5% [99.1, 100.5] answered in its words" in chosen["line"] and "hurts" not in chosen["line"]
    assert recommend(own_rows(), 0.8)["method"] == "none" and recommend(own_rows(), 15)["method"] == "divprune:keep=0.25"


@pytest.mark.parametrize("answered", [200, 120])
def test_where_there_are_answers_accuracy_decides(answered):
    chosen = recommend(own_rows(right=True, answered=answered), 1)
    assert chosen["method"] == "divprune:keep=0.25" and (chosen["difference"], chosen["difference_interval"][0]) == (0.0, -0.5)
    assert chosen["rule"] == f"at most 1 point of right answers lost on the {answered} requests that have an answer"


def test_a_few_answers_do_not_overrule_the_agreement_of_all_requests():
    chosen = recommend(own_rows(right=True, answered=50), 1)
    assert chosen["method"] == "divprune:keep=0.5" and chosen["rule"] == "at least 99% answered in the uncompressed model's words"


# ------------------------------------------------------------------------------------------------ tables and plots


def test_own_requests_have_columns_of_their_own():
    gone = row_of("pool:keep=0.5", "method", "keep=0.5", None, None, None, None, None, "RuntimeError: no")
    header, lines = main_table([*own_rows(right=True), gone])
    assert header[:3] == ["method", "tokens", "same answer"] and not {"score", "vs none [95%]", "retention"} & set(header)
    found = dict(zip(header, lines[2]))
    assert (found["same words [95%]"], found["right"], found["right vs none [95%]"]) == ("90.0 [86.0, 91.0]", "90.0", "+0.0 [-0.5, +1.0]")
    assert found["KL nats [95%]"].startswith("0.2000 [") and lines[3][:3] == ["pool:keep=0.5", "", "failed"]
    assert "right" not in main_table(own_rows())[0] and all(len(line) == len(header) for line in lines)


def test_the_score_is_accuracy_only_where_every_request_has_an_answer():
    for rows, metric, score in (
        (own_rows(), "normalised_match", 90.0),
        (own_rows(right=True, answered=199), "normalised_match", 90.0),
        (own_rows(right=True), "accuracy", 90.0),
    ):
        assert rows[2]["metric"] == metric and rows[2]["score"] == score and rows[0]["score"] == (90 if metric == "accuracy" else 100)
    first = next(csv.DictReader(io.StringIO(csv_text(own_rows(right=True)))))
    assert (
        first["agreement_kl_score"] == "0.0" and first["agreement_accuracy_score_interval_low"] == "90.0" and first["metric"] == "accuracy"
    )


def test_tables_show_a_failed_cell_with_its_reason():
    gone = row_of("pool:keep=0.5", "method", "keep=0.5", None, None, None, None, None, "RuntimeError: no")
    header, lines = main_table([*rows(), gone])
    assert all(len(line) == len(header) for line in lines)
    assert lines[-1][:3] == ["pool:keep=0.5", "", "failed"] and failures([*rows(), gone])[-1] == "failed: pool:keep=0.5: RuntimeError: no"
    assert lines[-2][0] == "random:keep=0.25 (failed)"
    assert lines[1][header.index("vs none [95%]")] == "-0.2 [-0.6, +0.8]" and lines[1][header.index("TTFT ms")] == "10.0 [9.0, 12.0]"
    header, lines = task_table([*rows(), gone])
    assert header == ["method", "tokens", "count", "reading", "macro"] and lines[0][0] == "no-image" and len(lines) == 6


def test_columns_that_nothing_fills_are_left_out():
    header, _ = main_table([row("none", 90.0, ttft=None), row("random:keep=0.5", 88.0, ttft=None)])
    assert "TTFT ms" not in header and "FLOPs" in header and "asked" not in header
    assert "asked" in main_table(rows(), asked=True)[0]


def test_csv_has_a_column_for_every_number():
    first, *others = csv.DictReader(io.StringIO(csv_text(rows())))
    assert first["method"] == "none" and first["ttft_ms_median"] == "10.0" and first["task_reading_difference_interval_low"] == "0.0"
    assert "tokens" in first and "tokens_per_s_median" in first and "ttft_ratio" not in first
    assert len(others) == 4 and others[-1]["failed"].startswith("3 of 50")


def test_the_front_holds_what_nothing_beats():
    assert plots.front([(100, 90), (50, 80), (60, 70), (50, 79), (20, 60), (100, 85)]) == [4, 1, 0]


@pytest.mark.parametrize(
    ("spec", "series"),
    [
        ("divprune:keep=0.25", "divprune"),
        ("divprune:tokens=64,metric=l2", "divprune:metric=l2"),
        ("random:seed=3,keep=0.5,min_tokens=4", "random:seed=3"),
        ("none", "none"),
    ],
)
def test_a_series_is_a_method_without_its_budget(spec, series):
    assert plots.series_of(spec) == series


@pytest.mark.once
@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=lambda t: t.name)
def test_plots_are_png_files(theme):
    assert plots.png(plots.pareto(own_rows(), plots.flops, "FLOPs", max_drop=None, theme=theme))[:4] == b"\x89PNG"
    for price in (plots.flops, plots.ttft):
        assert plots.png(plots.pareto(rows(), price, "FLOPs", max_drop=1, theme=theme))[:4] == b"\x89PNG"
    assert plots.png(plots.bars(rows(), "keep=0.5", theme))[:4] == b"\x89PNG"


@pytest.mark.once
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("max_drop", [0, 1, 80])
def test_equal_scores_are_drawn(max_drop):
    same = [row("none", 90.0), row("random:keep=0.5", 90.0), row("uniform:keep=0.5", 90.0), row("pool:keep=0.5", 95.0)]
    assert plots.png(plots.pareto(same, plots.flops, "FLOPs", max_drop=max_drop))[:4] == b"\x89PNG"


def test_without_a_cost_there_is_no_plot_of_it():
    assert plots.pareto([row("none", 90.0, ttft=None), row("random:keep=0.5", 88.0, ttft=None)], plots.ttft, "TTFT", max_drop=1) is None
    assert plots.bars(rows(), "keep=0.7") is None


# ------------------------------------------------------------------------------------------------ the page


class Page(HTMLParser):
    """All tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return page(Finished.read(finish(tmp_path_factory.mktemp("page") / "run", rows())))


@pytest.mark.once
def test_the_page_asks_for_nothing_outside(html):
    seen = Page(html)
    assert seen.open == []
    for tag, attributes in seen.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "srcset", "href", "action", "poster", "data"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:image/", "#")) or not value or (tag == "a" and value.startswith("https://arxiv.org/"))
        assert not any(name.startswith("on") for name in attributes)
    assert re.findall(r"@import|url\(", html) == [] and "default-src 'none'" in html


def test_ids_are_unique_and_every_section_is_there(html):
    ids = [a["id"] for _, a in Page(html).tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = "tiny failures recommendation pareto plot-flops plot-ttft table-cells table-categories bars kept how page-errors".split()
    assert set(wanted) <= set(ids)


def test_all_text_is_escaped(html):
    seen, text = Page(html), " ".join(Page(html).words)
    assert NASTY in text and all(a.get("onerror") is None for _, a in seen.tags)
    assert '<img src="http://example.org' not in html


def test_the_page_says_what_was_run_and_that_the_model_is_tiny(html):
    text = " ".join(" ".join(Page(html).words).split())
    assert "Offline self-test on a tiny model, not evidence about 7B models." in text
    for said in (
        "mllm-efficient sweep --import",
        "divprune:keep=0.5",
        "3 of 50 answers failed",
        "float32",
        "torch 2",
        "reading",
        "-4.2 points",
    ):
        assert said in text
    assert text.index("divprune:keep=0.5") < text.index("Accuracy against cost")


@pytest.mark.once
def test_another_model_is_not_called_tiny(tmp_path):
    assert "7B models" not in page(Finished.read(finish(tmp_path / "run", rows(), model="llava-hf/llava-1.5-7b-hf")))


@pytest.fixture(scope="module")
def own_html(tmp_path_factory) -> str:
    """A page of own requests: pictures that are there, one that is gone, one that is no picture, an answer that failed."""
    folder = tmp_path_factory.mktemp("own")
    Image.new("RGB", (40, 20), "red").save(folder / "red.png")
    (folder / "text.png").write_text("no picture")
    far = [
        apart("gone", 0.5, folder / f"{NASTY}.png"),
        apart("text", 0.75, folder / "text.png"),
        apart("red", 2.0, *[folder / "red.png"] * 6),
        apart("red", None, folder / "red.png", method="divprune:keep=0.25", answer=None, baseline_answer=None, error=f"Oops: {NASTY}"),
        *(apart(f"r{i}", 0.01 * (i + 1)) for i in range(30)),
    ]
    return page(Finished.read(finish(folder / "run", own_rows(), **own_meta(worst=far))))


def test_the_farthest_requests_are_shown_with_pictures_and_all_answers(own_html):
    worst = own_html[own_html.index('id="worst"') : own_html.index('id="kept"')]
    text = " ".join(" ".join(Page(worst[worst.index("<h2>") :].rpartition("<section")[0].rpartition("</section>")[0]).words).split())
    places = [text.index(f"{name} in full") for name in ("red", "text", "gone", "r29", "r13")]
    assert text.startswith("The 20 requests farthest") and places == sorted(places) and "r12 in full" not in text
    assert worst.count("data:image/jpeg;base64,") == 4 and "and 2 more" in text and "KL 2.000" in text
    assert text.count("picture not found: ") == 2 and f"failed: Oops: {NASTY}" in text


def test_the_page_of_own_requests_is_escaped_and_asks_for_nothing_outside(own_html):
    seen, text = Page(own_html), " ".join(Page(own_html).words)
    assert seen.open == [] and all(a.get("onerror") is None for _, a in seen.tags) and '<img src="http' not in own_html
    assert all((a.get("src") or "data:image/").startswith("data:image/") for _, a in seen.tags)
    assert "at least 99% answered in the uncompressed model's words" in text and "what ends above the dotted line is admitted" in text
    assert "Agreement against cost" in text and "table-categories" not in own_html


@pytest.mark.once
def test_the_plot_does_not_claim_to_decide_where_the_answers_do(tmp_path):
    for name, answered, claims in (("some", 120, False), ("all", 200, True)):
        rows = own_rows(right=True, answered=answered)
        text = page(Finished.read(finish(tmp_path / name, rows, **own_meta())))
        assert ("what ends above the dotted line is admitted" in text) == claims
        assert ("is decided by the requests that have an answer" in text) == (not claims)


@pytest.mark.once
def test_keeping_the_uncompressed_model_is_said_in_words(tmp_path):
    text = page(Finished.read(finish(tmp_path / "run", rows())), 0.5)
    assert '<b id="spec">Keep the uncompressed model</b>' in text and '<code id="spec">' not in text


def test_each_category_has_its_own_interval_in_its_tooltip(html):
    table = html[html.index('id="table-categories"') :]
    cells = re.findall(r'title="([^"]*) against none">', table[: table.index("</table>")])
    assert cells[:2] == ["-0.2 points [-0.6, +0.8]", "-4.2 points [-0.6, +0.8]"]  # count and reading of the first method


@pytest.mark.slow
def test_chromium_opens_the_page_without_an_error(html, own_html, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    file = tmp_path / "report.html"

    def dumped(text: str) -> str:
        file.write_text(text)
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
            f"{file.as_uri()}#self-test",
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        return run.stdout

    def errors(dom: str) -> str:
        return re.search(r'<pre id="page-errors"[^>]*>(.*?)</pre>', dom, re.DOTALL)[1].strip()

    dom = dumped(html)  # the self-test clicks every header
    assert errors(dom) == ""
    body = re.search(r'<table id="table-cells">.*?<tbody>(.*?)</tbody>', dom, re.DOTALL)[1]
    assert body.count("<tr") == 5 and len(re.findall(r"<th [^>]*aria-sort=", dom)) == 2
    assert errors(dumped(own_html)) == ""
    assert "nothing_of_the_kind" in errors(dumped(html.replace("if (location.hash", "setTimeout(nothing_of_the_kind);\nif (location.hash")))
    assert "blocked" in errors(dumped(html.replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">')))


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.once
@pytest.mark.parametrize("kind", ["md", "csv", "latex", "html"])
def test_report_renders_own_requests(capsys, tmp_path, kind):
    run = finish(tmp_path / "run", own_rows(), **own_meta())
    assert main(["report", str(run), "--format", kind]) == 0
    text = capsys.readouterr().out
    assert "divprune:keep=0.5" in text and "macro" not in text and "None split" not in text


@pytest.mark.parametrize("kind", ["md", "csv", "latex", "html"])
def test_agreement_by_length_is_in_every_format(capsys, tmp_path, kind):
    bins = {"1": [1, 1], "2": [2, 2], "3-4": [3, 4]}
    curve = {b: {"tokens": t, "n": 12, "normalised_match": 75.0, "normalised_match_interval": [42.8, 94.5]} for b, t in bins.items()}
    the_rows = [r | ({"by_length": curve} if r["role"] != "baseline" else {}) for r in own_rows()]
    assert main(["report", str(finish(tmp_path / "run", the_rows, **own_meta())), "--format", kind]) == 0
    text = capsys.readouterr().out
    if kind == "csv":
        row = next(r for r in csv.DictReader(io.StringIO(text)) if r["method"] == "divprune:keep=0.5")
        assert (row["by_length_3-4_n"], row["by_length_3-4_normalised_match_interval_low"]) == ("12", "42.8")
    else:
        assert "tokens of the answer" in text and "75.0" in text and "42.8, 94.5" in text
    assert ('id="lengths"' in text) == (kind == "html")


def test_markdown_is_md(capsys, tmp_path):
    run = finish(tmp_path / "run", rows())
    said = [main(["report", str(run), "--format", kind]) or capsys.readouterr().out for kind in ("md", "markdown")]
    assert said[0] == said[1] and "|---|" in said[0]


@pytest.mark.once
@pytest.mark.parametrize("kind", ["md", "csv", "latex", "html"])
def test_report_renders_a_run(capsys, tmp_path, kind):
    run = finish(tmp_path / "run", rows())
    assert main(["report", str(run), "--format", kind]) == 0
    text = capsys.readouterr().out
    assert "divprune:keep=0.5" in text and {"md": "|---|", "csv": "method,", "latex": r"\toprule", "html": "<!DOCTYPE"}[kind] in text
    assert main(["report", str(run), "--format", kind, "--output", str(tmp_path / "sub" / "out")]) == 0
    assert (tmp_path / "sub" / "out").read_text() == text and capsys.readouterr().out == ""


def test_max_drop_can_be_asked_anew(capsys, tmp_path):
    run = finish(tmp_path / "run", rows())
    assert main(["report", str(run), "--max-drop", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["meta"]["recommendation"]["method"] == "divprune:keep=0.25"


def test_runs_merge_to_all_their_cells_with_one_baseline(capsys, tmp_path):
    all_rows = rows()
    a, b = finish(tmp_path / "a", all_rows[:3]), finish(tmp_path / "b", [all_rows[0], *all_rows[2:]])
    assert main(["report", str(a), str(b), str(a), "--json"]) == 0
    merged = json.loads(capsys.readouterr().out)
    assert [r["method"] for r in merged["rows"]] == [r["method"] for r in all_rows] and len(merged["meta"]["metas"]) == 2


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"weights": "def"}, "weights is abc in the first and def in the second"),
        ({"suite": "pope"}, "suite"),
        ({"split": "val"}, "split"),
        ({"questions": 50}, "questions"),
        ({"questions_fingerprint": "bar"}, "questions_fingerprint"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"device": "cuda:0 (H100)"}, "device"),
        ({"quantization": "int8"}, "quantization"),
        ({"versions": meta()["versions"] | {"transformers": "6"}}, "versions.transformers is 5 in the first and 6 in the second"),
        ({"versions": meta()["versions"] | {"torch": "3"}}, "versions.torch"),
        ({"workload": {"text_tokens": 8}}, "workload"),
    ],
    ids=lambda v: v.split()[0] if isinstance(v, str) else "",
)
def test_what_cannot_be_compared_is_not_merged(capsys, tmp_path, changes, field):
    a, b = finish(tmp_path / "a", rows()), finish(tmp_path / "b", rows(), **changes)
    said = fails(capsys, "report", a, b)
    assert "cannot be merged" in said and field in said


def test_other_answers_of_one_method_are_not_merged(capsys, tmp_path):
    other = copy.deepcopy(rows())
    other[0]["score"] = 91.0
    a, b = finish(tmp_path / "a", rows()), finish(tmp_path / "b", other)
    assert "score of none is 90.0 in the first and 91.0 in the second" in fails(capsys, "report", a, b)


def test_what_is_no_finished_run_is_one_line(capsys, tmp_path):
    assert "no run folder" in fails(capsys, "report", tmp_path / "nothing")
    assert "holds no finished run" in fails(capsys, "report", tmp_path)
    (tmp_path / "report.json").write_text("{}")
    assert "is not a report" in fails(capsys, "report", tmp_path)
    assert "is not one of md, csv, latex, html" in fails(capsys, "report", tmp_path, "--format", "pdf")
    assert "Missing argument" in fails(capsys, "report")


def test_a_run_of_eval_is_rendered_too(capsys, tmp_path):
    argv = [
        "eval",
        "--method",
        "random:keep=0.25",
        "--limit",
        "14",
        "--split",
        "val",
        "--output-dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    assert main(argv) == 0
    capsys.readouterr()
    for kind in ("md", "csv", "latex", "html"):
        assert main(["report", str(tmp_path / "run"), "--format", kind]) == 0
        assert "random:keep=0.25" in capsys.readouterr().out
