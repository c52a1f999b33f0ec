"""OpenVINO GenAI's pruning beside ours on a CPU: from a picture in memory to the first token, in turn, in one run.

    python benchmarks/peers/openvino.py --output benchmarks/results/cpu-openvino.json
    python benchmarks/peers/openvino.py --dtype bfloat16 --output benchmarks/results/cpu-openvino-bf16.json
    python benchmarks/peers/openvino.py --dry-run                 # says what would be done

A Qwen2.5-VL of about 200 M random weights and 900 visual tokens. What OpenVINO needs goes into an environment of its own in a temporary
folder (``--folder`` keeps it): its exporter wants an older transformers. There the model is made and exported; then each side is a process
that loads the same folder, and the two are asked in turn. Both compute in the precision of ``--dtype``: OpenVINO would take bfloat16 by
itself where the CPU has it. Both tokenize, prepare the picture and make one token; ours says what preparing the picture took.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve()
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != FILE.parent]  # this file would be found as the package openvino

PACKAGES = ("openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "transformers==4.57.6", "torch==2.13.0", "pillow")
HINTS = {"float32": "f32", "bfloat16": "bf16"}
REMOVED = (0, 80, 90)  # percent
SIDE, QUESTION = 840, "Describe what is shown."  # 30 x 30 visual tokens
SIZES: dict[str, Any] = {
    "text": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [8, 12, 12]},
    },
    "vision": {"depth": 6, "hidden_size": 384, "intermediate_size": 1024, "num_heads": 6, "fullatt_block_indexes": [2, 5]},
}  # fmt: skip
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MEANING = {
    "ms": "from the picture in memory to the first token, by the wall clock of the side's own process: tokenizer, preparing the picture, "
    "tower, pruning, prefill",
    "preprocess_ms": "ours: of which the processor",
    "embeddings_ms": "OpenVINO's own count of preparing the picture, tower and pruning",
    "over_openvino": "our ms over OpenVINO's of the same repeat with as much removed: median, and 95% of medians of resampled repeats",
    "over_whole": "each side's ms over its own with nothing removed",
}


# ------------------------------------------------------------------------------------------------ the model


def make(folder: Path, sizes: dict[str, Any]) -> None:
    """Writes a Qwen2.5-VL of random weights with a byte-level tokenizer, which any version of transformers reads."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = byte_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL))))
    text = sizes["text"] | {
        "vocab_size": len(tokenizer), "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=sizes["vision"] | {"out_hidden_size": text["hidden_size"]},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"], tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.save_pretrained(folder)
    processor_of(tokenizer).save_pretrained(folder)


def byte_tokenizer() -> Any:
    """A token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2TokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    return Qwen2TokenizerFast(tokenizer_object=core, additional_special_tokens=list(SPECIAL[1:]), chat_template=TEMPLATE, **names)


def processor_of(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    sizes = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


# ------------------------------------------------------------------------------------------------ the sides


def picture() -> Any:
    """(SIDE, SIDE, 3) bytes of seeded noise."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def openvino_side(folder: Path, dtype: str, threads: int) -> Callable[[int], dict[str, Any]]:
    """removed (percent) -> one measurement. Nothing is kept from one call to the next."""
    import openvino_genai as genai
    from openvino import Tensor

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # the same prompt again would cost nothing
    scheduler.max_num_batched_tokens = sys.maxsize
    settings = {"INFERENCE_PRECISION_HINT": HINTS[dtype], "KV_CACHE_PRECISION": HINTS[dtype], "INFERENCE_NUM_THREADS": threads}
    pipe = genai.VLMPipeline(str(folder), "CPU", scheduler_config=scheduler, **settings)
    image = Tensor(picture())

    def once(removed: int) -> dict[str, Any]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.pruning_ratio, config.do_sample = 1, removed, False
        begin = time.perf_counter()
        metrics = pipe.generate(QUESTION, images=[image], generation_config=config).perf_metrics
        ms = 1000 * (time.perf_counter() - begin)
        return {"ms": ms, "embeddings_ms": metrics.get_prepare_embeddings_duration().mean, "prompt": metrics.get_num_input_tokens()}

    return once


def our_side(folder: Path, dtype: str, threads: int) -> Callable[[int], dict[str, Any]]:
    """The same of this package."""
    import torch
    from PIL import Image

    import mllm_efficient as me
    from mllm_efficient.loading.models import ModelOptions, load

    torch.set_num_threads(threads)
    loaded, image = load(ModelOptions(model=str(folder), device="cpu", dtype=dtype)), Image.fromarray(picture())
    me.wrap(loaded.model, "divprune:keep=0.5")

    def once(removed: int) -> dict[str, Any]:
        method = me.build(f"divprune:keep={(100 - removed) / 100}") if removed else None
        begin = time.perf_counter()
        inputs = loaded.inputs([loaded.prompt(QUESTION, 1)], [image])
        ready = time.perf_counter()
        loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False, compression=method)
        end = time.perf_counter()
        went = sum(i.full - i.kept for i in me.last_report(loaded.model).images) if method else 0
        return {"ms": 1000 * (end - begin), "preprocess_ms": 1000 * (ready - begin), "prompt": inputs["input_ids"].shape[1] - went}

    return once


SIDES = {"openvino": openvino_side, "ours": our_side}


def serve(make_side: Callable[[], Callable[[int], dict[str, Any]]]) -> None:
    """Reads a percentage a line and answers with a measurement; what libraries print goes to the error output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    once = make_side()
    for line in sys.stdin:
        print(json.dumps(once(int(line))), file=answers, flush=True)


@contextmanager
def served(command: Sequence[str], threads: int) -> Iterator[Callable[[int], dict[str, Any]]]:
    """A function removed -> measurement that a process answers."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        asked, answered = process.stdin, process.stdout

        def ask(removed: int) -> dict[str, Any]:
            print(removed, file=asked, flush=True)
            answer = answered.readline()
            if not answer:
                raise RuntimeError(f"{shlex.join(command)} ended: see above")
            return json.loads(answer)

        try:
            yield ask
        finally:
            with suppress(BrokenPipeError):
                asked.close()


# ------------------------------------------------------------------------------------------------ in turn


def compare(sides: dict[str, Callable[[int], dict[str, Any]]], removed: Sequence[int], warmup: int, repeats: int) -> dict[str, Any]:
    """Rows of every side and percentage, and the percentages at which the sides' prompts are not equally long, which none should be."""
    from mllm_efficient.measure.timing import Series, interleave, paired, spread

    arms, prompts = {(side, r): Series(f"{side} {r}") for side in sides for r in removed}, dict[str, int]()

    def turn(arm: Series) -> dict[str, float]:
        side, percent = arm.name.split()
        found = sides[side](int(percent))
        prompts[arm.name] = found.pop("prompt")
        return found

    interleave(list(arms.values()), turn, warmup=warmup, repeats=repeats)
    rows = []
    for (side, r), arm in arms.items():
        ms, theirs = arm.values("ms"), arms["openvino", r].values("ms")
        row: dict[str, Any] = {"side": side, "removed": r} | {name: spread(arm.values(name)) for name in arm.samples}
        row |= {"prompt_tokens": prompts.get(arm.name), "over_whole": paired(ms, arms[side, removed[0]].values("ms")), "failed": arm.failed}
        rows.append(row | ({"over_openvino": paired(ms, theirs)} if side == "ours" else {}))
    unlike = [r for r in removed if len({prompts.get(f"{side} {r}") for side in sides}) > 1]
    return {"rows": rows, "unequal_prompts": unlike}


def steps(folder: Path) -> list[list[str]]:
    """The commands that make the environment, the model and what OpenVINO reads, in their order."""
    python, model, exported = folder / "env" / "bin" / "python", folder / "model", folder / "openvino"
    installed = folder / "env" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    shim = FILE.parents[2] / "patches" / "torchvision_cpu.py"  # for a torchvision that was built for CUDA beside a torch for CPUs
    export = [str(folder / "env" / "bin" / "optimum-cli"), "export", "openvino", "--model", str(model), "--task", "image-text-to-text"]
    return [
        [sys.executable, "-m", "venv", str(folder / "env")],
        [str(python), "-m", "pip", "install", "-q", *PACKAGES],
        [sys.executable, "-c", "import shutil, sys; shutil.copy(*sys.argv[1:])", str(shim), str(installed)],
        [str(python), "-m", shim.stem],
        [str(python), str(FILE), "--make", str(model)],
        [*export, "--weight-format", "fp32", str(exported)],
    ]


def command_of(side: str, folder: Path, dtype: str, threads: int) -> list[str]:
    python, data = (folder / "env" / "bin" / "python", "openvino") if side == "openvino" else (Path(sys.executable), "model")
    return [str(python), str(FILE), "--serve", side, "--folder", str(folder / data), "--dtype", dtype, "--threads", str(threads)]


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rows and meta. What is in the folder already is not made again."""
    from mllm_efficient.measure.machine import machine, versions
    from mllm_efficient.measure.timing import ORDER

    done, begin = (folder / "done"), machine([])
    if not done.is_file():
        for command in steps(folder):
            print(shlex.join(command), file=sys.stderr)
            subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=sys.stderr)
        done.touch()
    with ExitStack() as stack:
        sides = {s: stack.enter_context(served(command_of(s, folder, options.dtype, options.threads), options.threads)) for s in SIDES}
        found = compare(sides, REMOVED, options.warmup, options.repeats)
    sizes = sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors"))
    return {**found, "meta": {
        "dtype": {"ours": options.dtype, "openvino": f"INFERENCE_PRECISION_HINT and KV_CACHE_PRECISION {HINTS[options.dtype]}"},
        "weights_mb": round(sizes / 1e6, 1), "sizes": SIZES, "threads": options.threads, "packages": PACKAGES, "method": "divprune",
        "warmup": options.warmup, "repeats": options.repeats, "order": f"all arms {ORDER}", "meaning": MEANING,
        "versions": versions("torch", "transformers"), "machine": begin, "machine_after": machine([]),
    }}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", choices=HINTS, default="float32", help="of both sides")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keeps the environment and the model here; what is there is used again")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="print the commands and do nothing")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.make:
        make(options.make, SIZES)
    elif options.serve:
        serve(lambda: SIDES[options.serve](options.folder, options.dtype, options.threads))
    elif options.dry_run:
        folder = options.folder or Path(tempfile.gettempdir()) / "openvino-peer"
        for command in [*steps(folder), *(command_of(side, folder, options.dtype, options.threads) for side in SIDES)]:
            print(shlex.join(command))
    else:
        return whole(options)
    return 0


def whole(options: argparse.Namespace) -> int:
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        found = json.dumps(run(folder, options), indent=1, allow_nan=False)
    print(found)
    if options.output:
        options.output.write_text(found + "\n")
    result = json.loads(found)
    return 1 if result["unequal_prompts"] or any(row["failed"] for row in result["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
