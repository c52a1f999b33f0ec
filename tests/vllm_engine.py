"""One engine of vLLM for a job (``model``, ``engine``, ``calls``). As a script: reads it as JSON from stdin, prints ``ANSWERS`` and JSON.

A call: ``prompts``, ``images`` (paths, a list for each prompt), ``tokens`` (of the request, or null), ``new``,
``adapter`` (a folder, or null). Of the job, ``asks_again``: see ``as_on_a_gpu``.
"""

from __future__ import annotations

import json
import os
import sys

MARK = "ANSWERS "


def as_on_a_gpu() -> None:
    """Lets the runner for CPUs ask for M-RoPE positions again, as those for GPUs do at the end of ``load_model``."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from mllm_efficient.patches.vllm import qwen

    load_model = CPUModelRunner.load_model

    def load(self, *args, **kwargs):
        load_model(self, *args, **kwargs)
        self.is_multimodal_pruning_enabled = self.model_config.multimodal_config.is_multimodal_pruning_enabled()

    CPUModelRunner.load_model, qwen.asks_again = load, lambda: True


def answers(job: dict) -> list[dict]:
    """Of each call: ``answers`` and ``prompt_tokens``, or ``error``."""
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    if job.get("asks_again"):
        as_on_a_gpu()
    fixed = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True, "limit_mm_per_prompt": {"image": 2}}
    llm = LLM(job["model"], **{**fixed, **job["engine"]})
    out = []
    for call in job["calls"]:
        requests = []
        for prompt, images in zip(call["prompts"], call["images"]):
            request = {"prompt": prompt, "multi_modal_data": {"image": [Image.open(p).convert("RGB") for p in images]}}
            if call.get("tokens") is not None:
                request["mm_processor_kwargs"] = {"visual_tokens": call["tokens"]}
            requests.append(request)
        try:
            adapter = LoRARequest("adapter", 1, call["adapter"]) if call.get("adapter") else None
            done = llm.generate(requests, SamplingParams(temperature=0, max_tokens=call["new"]), use_tqdm=False, lora_request=adapter)
        except ValueError as error:
            out.append({"error": str(error)})
            continue
        out.append({"answers": [d.outputs[0].text.strip() for d in done], "prompt_tokens": [len(d.prompt_token_ids) for d in done]})
    return out


if __name__ == "__main__":
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
    if "tensor_parallel_size" not in sys.argv:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    print(MARK + json.dumps(answers(json.load(sys.stdin))))
