"""vLLM's front end without an engine, for a list of jobs.

A job: ``model`` (a folder), ``settings`` (or null), ``calls``. A call: ``prompt``, ``images`` (paths), ``tokens`` (of the request, or
null), ``names`` (that a client gives to its images, or null). Of each: the length of every image's placeholder and its hash, or ``error``.
With ``video`` one is offered instead; with ``warm_up`` there is the server's own instead of a request. With ``counted`` no request is
made: the method that is named for the model and the counters there are.
"""

from __future__ import annotations


def counts(jobs: list[dict]) -> list[dict]:
    """What the front end says to every call of every job."""
    import numpy as np
    from PIL import Image
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    out = []
    for job in jobs:
        overrides = {} if job["settings"] is None else {"visual_token_compression": job["settings"]}
        config = ModelConfig(job["model"], dtype="float32", max_model_len=1024, hf_overrides=overrides, limit_mm_per_prompt={"image": 2})
        processor = MULTIMODAL_REGISTRY.create_processor(config)
        for call in job["calls"]:
            if call.get("warm_up"):
                processor.get_dummy_mm_inputs({"image": 1})
                continue
            if call.get("counted"):
                out.append(counted(config))
                continue
            if call.get("video"):
                try:
                    processor.info.parse_mm_data(
                        {
                            "video": [
                                (np.zeros((4, 16, 16, 3), np.uint8), {"fps": 1.0, "frames_indices": [0, 1, 2, 3], "total_num_frames": 4})
                            ]
                        }
                    )
                except Exception as error:  # vLLM's own kind, whose name is not the same in every version
                    out.append({"error": str(error)})
                continue
            items = processor.info.parse_mm_data({"image": [Image.open(p).convert("RGB") for p in call["images"]]})
            names = {"image": call["names"]} if call.get("names") else None
            asked = {} if call.get("tokens") is None else {"visual_tokens": call["tokens"]}
            try:
                done = processor(call["prompt"], items, mm_uuid_items=names, hf_processor_mm_kwargs=asked)
            except ValueError as error:
                out.append({"error": str(error)})
                continue
            places = done["mm_placeholders"]["image"]
            out.append(
                {"lengths": [p.length for p in places], "hashes": done["mm_hashes"]["image"], "prompt": len(done["prompt_token_ids"])}
            )
    return out


def counted(config) -> dict:
    """What ``/v1/models`` and ``/metrics`` say of a model; a counter that is not there is null."""
    from prometheus_client import REGISTRY

    from mllm_efficient.patches.vllm import metrics

    method = metrics.SERVED.get(config.served_model_name)
    labels = {"model_name": config.served_model_name, "method": method}
    return {
        "method": method,
        "counts": [REGISTRY.get_sample_value(f"{n}_total", labels) for n in (metrics.FULL, metrics.KEPT, metrics.IMAGES)],
    }
