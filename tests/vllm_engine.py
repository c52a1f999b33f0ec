"""One engine of vLLM for a job (``model``, ``engine``, ``calls``). As a script: reads it as JSON from stdin, prints ``ANSWERS`` and JSON.

A call: ``prompts``, ``images`` (paths, a list for each prompt), ``tokens`` (of the request, or null), ``new``,
``adapter`` (a folder, or null), ``more`` (other settings of the request, or null); with ``pruner``: see ``by_the_pruner``.
Of the job, ``asks_again``: see ``as_on_a_gpu``; ``breaks``: see ``with_faults``.
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


def with_faults() -> None:
    """Lets the towers give NaN for pictures that begin white, and a row too few for those that begin black."""
    from mllm_efficient.patches.vllm import models

    def faulty(stock):
        def process(self, image_input):
            out, pixels = list(stock(self, image_input)), image_input["pixel_values"]
            for i, first in enumerate(p.reshape(-1, *p.shape[-3:])[0, :, :8, :8].mean(dim=(1, 2)) for p in pixels):
                if first.min() > 0.95:
                    out[i] = out[i] * float("nan")
                elif first.max() < -0.95:
                    out[i] = out[i][:-1]
            return out

        return process

    for module, name in ((models.llava, "Llava"), (models.llava_onevision, "LlavaOnevision")):
        cls = getattr(module, f"{name}ForConditionalGeneration")
        cls._process_image_input = faulty(cls._process_image_input)


def by_the_pruner(llm, prompt: str, paths: list[str]) -> dict:
    """Positions (3, L) of a prompt as Model Runner V2 of GPUs gets them: by its own class, which asks the model; and the rows it leaves."""
    from types import SimpleNamespace

    import numpy as np
    import torch
    from PIL import Image
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.multimodal.utils import group_and_batch_mm_kwargs
    from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    processor = runner.mm_registry.create_processor(runner.model_config)
    done = processor(prompt, processor.info.parse_mm_data({"image": [Image.open(p).convert("RGB") for p in paths]}))
    ids, items = done["prompt_token_ids"], done["mm_kwargs"]["image"]
    features = [
        MultiModalFeatureSpec(data=item, modality="image", identifier=str(i), mm_position=place)
        for i, (item, place) in enumerate(zip(items, done["mm_placeholders"]["image"]))
    ]
    embeds = [e for *_, batch in group_and_batch_mm_kwargs([("image", i) for i in items]) for e in runner.model.embed_multimodal(**batch)]
    positions, found = runner.model.get_mrope_input_positions(ids, features)[0], {}
    rope = SimpleNamespace(
        read_prefill_positions=lambda request, length: positions[:, :length],
        update_prefill_positions=lambda request, new, delta: found.update(positions=new.tolist(), delta=delta),
    )
    batch = SimpleNamespace(
        req_ids=["a"], idx_mapping_np=np.array([0]), prefill_len_np=np.array([len(ids)]), num_scheduled_tokens=np.array([len(ids)]),
        num_computed_prefill_tokens_np=np.array([0]),
    )  # fmt: skip
    states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=torch.tensor([ids])))
    pruner = MultiModalPruner(
        runner.model, rope, SimpleNamespace(mm_features={"a": features}), runner.model_config.get_inputs_embeds_size()
    )
    left, stripped = pruner.recompute(embeds, batch, states), pruner.strip(embeds)
    # what a draft model gets ends with the embeddings; features of deepstack stand behind those of the model itself
    alike = all(torch.equal(a[:, : b.shape[1]], b) for a, b in zip(left, stripped))
    return {**found, "ids": ids, "rows": [len(e) for e in left], "alike": alike}


def answers(job: dict) -> list[dict]:
    """Of each call: ``answers`` and ``prompt_tokens``, or ``error``."""
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    if job.get("asks_again"):
        as_on_a_gpu()
    if job.get("breaks"):
        with_faults()
    fixed = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True, "limit_mm_per_prompt": {"image": 2}}
    llm = LLM(job["model"], **{**fixed, **job["engine"]})
    out = []
    for call in job["calls"]:
        if call.get("pruner"):
            out.append(by_the_pruner(llm, call["prompts"][0], call["images"][0]))
            continue
        requests = []
        for prompt, images in zip(call["prompts"], call["images"]):
            request = {"prompt": prompt, "multi_modal_data": {"image": [Image.open(p).convert("RGB") for p in images]}}
            asked = {} if call.get("tokens") is None else {"visual_tokens": call["tokens"]}
            if asked or call.get("more"):
                request["mm_processor_kwargs"] = {**asked, **(call.get("more") or {})}
            requests.append(request)
        try:
            adapter = LoRARequest("adapter", 1, call["adapter"]) if call.get("adapter") else None
            done = llm.generate(requests, SamplingParams(temperature=0, max_tokens=call["new"]), use_tqdm=False, lora_request=adapter)
        except ValueError as error:
            out.append({"error": str(error)})
            continue
        said = {"answers": [d.outputs[0].text.strip() for d in done], "prompt_tokens": [len(d.prompt_token_ids) for d in done]}
        out.append({**said, "finished": [d.outputs[0].finish_reason for d in done]})
    return out


if __name__ == "__main__":
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
    if "tensor_parallel_size" not in sys.argv:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    print(MARK + json.dumps(answers(json.load(sys.stdin))))
