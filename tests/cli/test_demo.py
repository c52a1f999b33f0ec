"""The demo: what it computes, and the page driven in Chromium where gradio, Playwright and a browser are there."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from PIL import Image

import mllm_efficient as me
from mllm_efficient.cli import demo as page
from mllm_efficient.cli import main
from mllm_efficient.eval.demo import Demo
from mllm_efficient.loading.models import Loaded, ModelOptions, load

from ..families import EVERY, tiny

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def demo():
    return Demo(load(ModelOptions(device="cpu")), 8)


def test_it_compares_with_the_uncompressed_model(demo):
    image, question = me.sample(0)
    base, (kept, smaller) = demo.compare(image, question, ["divprune", "resize"], 0.25)
    assert (base.kept, base.full, kept.kept, smaller.kept) == (144, 144, 36, 36)
    assert base.flops_ratio == 1 and smaller.flops_ratio < kept.flops_ratio < 1 and base.seconds > 0
    assert kept.agrees_with(base) == (kept.text.lower() == base.text.lower())
    with me.compressed(demo.loaded.model, "divprune:keep=0.25"):
        pass  # nothing of the demo is left on the model


def test_what_cannot_be_is_said_beside_what_can(demo):
    image, question = me.sample(0)
    base, (one, other) = demo.compare(image, question, ["fastv", "divprune"], 0.1)
    assert "cannot be reached" in one and other.kept == 14 and base.kept == 144
    table, left, right = page.compared(demo, image, question, 0.1, ("fastv", "divprune"))
    assert left is None and right.shape[2] == 3 and "| fastv | " in table and "14 of 144" in table
    for wrong in ("", " " * 9, "x" * 501):
        with pytest.raises(me.MllmEfficientError, match="from 1 to 500 can be asked"):
            demo.ask(image, wrong, me.DivPrune(keep=0.5))


def test_native_is_compared_on_its_own_inputs():
    """A method that sets the processor: its tokens are those of the smaller inputs, against those of the processor as it came."""
    loaded = Loaded(tiny("qwen2_5_vl"), EVERY["qwen2_5_vl"].processor("left"), ModelOptions("qwen2_5_vl"))
    small = Demo(loaded, 2)
    assert "native" in small.methods()
    picture = Image.effect_noise((96, 64), 90).convert("RGB")
    base, (native, other) = small.compare(picture, "what", ["native", "random"], 0.3)
    assert (base.kept, base.full, native.kept, native.full, other.kept) == (40, 40, 8, 40, 12)
    table, *drawn = page.compared(small, picture, "what", 0.3, ("native", "random"))
    assert "8 of 40" in table and "12 of 40" in table and all(d is not None for d in drawn)


def test_a_method_that_cannot_run_leaves_the_other(demo):
    image, question = me.sample(0)
    base, (one, other) = demo.compare(image, question, ["native", "divprune"], 0.25)
    assert isinstance(one, str) and "native" in one and other.kept == 36 and base.kept == 144


def test_it_offers_what_the_model_runs(demo):
    names = demo.methods()
    assert {"divprune", "tome", "fastv", "cdpruner", "resize", "none"} <= set(names)


def test_a_bad_file_is_told_without_its_path(tmp_path):
    (tmp_path / "secret.png").write_text("no picture")
    with pytest.raises(me.MllmEfficientError, match="not an image") as said:
        page.read(str(tmp_path / "secret.png"))
    assert str(tmp_path) not in str(said.value)


def test_an_answer_is_no_markup():
    assert page._safe("a|b\n<i>*c*</i>") == "a&#124;b &#60;i&#62;&#42;c&#42;&#60;/i&#62;"


def test_without_gradio_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--device", "cpu"]) == 2
    assert "pip install 'mllm-efficient[demo]'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def served():
    """The address of a running demo."""
    pytest.importorskip("gradio", reason="the page needs gradio (extra demo)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mllm_efficient", "demo", "--device", "cpu", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            assert process.poll() is None, "the demo ended"
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_answers_moves_and_refuses(served, tmp_path):
    api = pytest.importorskip("playwright.sync_api", reason="the page is driven by Playwright")
    (tmp_path / "bad.png").write_text("no picture")
    me.sample(3)[0].save(tmp_path / "good.png")
    asked: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        view = browser.new_page()
        view.set_default_timeout(60_000)
        view.on("request", lambda request: asked.append(request.url))
        view.goto(served)

        def shows(*cells: str) -> None:
            """Waits until the table has these cells."""
            for cell in cells:
                view.locator("#table td", has_text=cell).first.wait_for()

        view.click("#ask button, button#ask")
        shows("uncompressed", "144 of 144", "36 of 144", "100%")
        assert view.locator("#left img").count() == view.locator("#right img").count() == 1
        slider = view.locator("#keep input[type=range]")
        slider.focus()
        for _ in range(15):  # from 0.25 to 0.1
            view.keyboard.press("ArrowLeft")
        slider.dispatch_event("pointerup")
        shows("14 of 144")
        view.set_input_files("#upload input[type=file]", tmp_path / "bad.png")
        view.locator(".toast-body", has_text="not an image").wait_for()
        browser.close()
    assert asked and all(url.startswith((served, "data:", "blob:")) for url in asked), "the network was asked"


def test_the_page_is_for_this_machine_alone_and_forgets(demo):
    gradio = pytest.importorskip("gradio", reason="the page needs gradio (extra demo)")
    assert page.build(gradio, demo, "builtin").delete_cache == (3600, 3600), "uploaded pictures are kept"
    how = page.how(gradio)
    assert (how["server_name"], how["share"], how["max_file_size"]) == ("127.0.0.1", False, "10mb")
    assert "default-src 'self'" in how["head"] and not any("google" in str(font).lower() for font in how["theme"]._font)
