"""Families without a class here, through vLLM's Transformers backend: ``--model-impl transformers``, or a folder that export wrote.

vLLM runs the model of transformers itself; its processor says which text stands for an image, and ``pieces`` what is left of it. What the
table of facts or a family's own rules know of a type in transformers is what counts here too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mllm_efficient.apply.plan import describe
from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import CountMismatchError, UnsupportedModelError

from .alone import Image, each_alone
from .front import FIELD, AnySizeInfo, CompressedProcessor, stock_kwargs
from .models import MULTIMODAL_REGISTRY, CompressedModel, logger, shortened
from .pieces import Pieces, kept_of_row, pieces_of, rules_of, runs_of, shapes_of, shortened_ids
from .qwen import COLUMNS, PlacesKept, keep_places, with_places
from .settings import KEY, REQUEST, is_projector, settings_of, untested

try:
    from vllm.model_executor.models import transformers as backend
    from vllm.model_executor.models.transformers import multimodal
    from vllm.multimodal.inputs import MultiModalFieldConfig
    from vllm.platforms import current_platform
except ImportError as error:
    raise UnsupportedModelError(f"this vLLM lacks what the plugin of mllm-efficient stands on ({error}): 0.31 to 0.33 have it") from error

IDS = "image_replacement_ids"  # of vLLM's processor: the tokens that stand for an image
GRID = "image_grid_thw"


class TransformersInfo(AnySizeInfo, multimodal.MultiModalProcessingInfo):
    """What the front end and the model both ask of the processor."""

    plain = multimodal.MultiModalProcessingInfo

    def most(self, method: Compressor) -> int:
        return kept_of_row(self.rules, method, self.get_max_image_tokens())

    def uncompressed(self, height: int, width: int) -> int:
        return int(self._get_num_mm_tokens(image_sizes=([height, width],))["num_image_tokens"][0])

    @functools.cached_property
    def rules(self) -> Any:
        """The family's, with the settings of the image processor that is served."""
        return rules_of(self.hf, self.get_hf_processor().image_processor.to_dict())

    def pieces(self, method: Compressor, runs: Sequence[int], size: tuple[int, int], grid: Sequence[int]) -> Pieces:
        return _pieces(self.rules, method, tuple(runs), tuple(size), tuple(grid))


@functools.lru_cache(maxsize=4096)
def _pieces(rules: Any, method: Compressor, runs: tuple[int, ...], size: tuple[int, int], grid: tuple[int, ...]) -> Pieces:
    return pieces_of(rules, method, shapes_of(rules, runs, size, grid), runs)


class TransformersProcessor(CompressedProcessor, multimodal.MultiModalProcessor):
    """The mark of an image also says its size and its runs of placeholders, by which the model plans again."""

    one_each = "num_image_patches"

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        out = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        if FIELD in out:
            parts = out[IDS].split(out["image_replacement_sizes"].tolist())
            token = [multimodal._get_embed_token_id(ids) for ids in parts]
            sizes = [mm_items["image"].get_image_size(i) for i in range(len(parts))]
            out[FIELD] = [
                torch.cat([mark, torch.tensor([size.height, size.width, *runs_of(ids.tolist(), t)])])
                for mark, size, ids, t in zip(out[FIELD], sizes, parts, token)
            ]
        return out

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Mapping[str, Any]:
        marks = hf_inputs.pop(FIELD, None)  # which vLLM would take for pixels
        fields = super(CompressedProcessor, self)._get_mm_fields_config(hf_inputs, stock_kwargs(hf_processor_mm_kwargs))
        if marks is None:
            return fields
        hf_inputs[FIELD] = marks
        return {**fields, FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any) -> Sequence[Any]:
        settings = self.info.settings
        if settings is not None and "image" in mm_items:
            method = settings.of_request(hf_processor_mm_kwargs.get(REQUEST))
            for item in out_mm_kwargs["image"]:
                ids = item[IDS].data.tolist()
                pieces = self.info.pieces(method, *placed(item[FIELD].data, item[GRID].data if GRID in item else None))
                item[IDS].data = torch.tensor(shortened_ids(ids, multimodal._get_embed_token_id(item[IDS].data), pieces))
        return super(CompressedProcessor, self)._get_prompt_updates(mm_items, stock_kwargs(hf_processor_mm_kwargs), out_mm_kwargs)


def placed(mark: torch.Tensor, grid: torch.Tensor | None) -> tuple[list[int], tuple[int, int], list[int]]:
    """The runs, the size and the grid in patches that a mark and a call say of an image."""
    _, _, height, width, *runs = mark.tolist()
    return runs, (height, width), [] if grid is None else grid.flatten().tolist()


class CompressedTransformers(PlacesKept, CompressedModel):
    """Over vLLM's Transformers backend."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self.served = vllm_config.model_config
        self.mrope = bool(self.served.uses_mrope)
        settings = settings_of(self.served.hf_config)
        if self.mrope and settings is not None:
            keep_places(vllm_config, settings.method)
        super(CompressedModel, self).__init__(vllm_config=vllm_config, prefix=prefix)
        if self.settings is None:
            return
        method, rules = self.settings.method, self.info.rules
        rules.check_positions(method.position_rule(rules))
        self.require(method)
        if unknown := untested(vllm_config):
            logger.warning("visual tokens: no test of mllm-efficient has run with %s: compare answers first", ", ".join(unknown))
        logger.info("visual tokens: %s", describe(method, rules.usual(), rules))

    @functools.cached_property
    def info(self) -> TransformersInfo:
        return MULTIMODAL_REGISTRY.get_processing_info(self.served)

    @property
    def merge(self) -> int:
        return self.info.rules.merge

    def require(self, method: Compressor) -> None:
        rules = self.info.rules
        method.check(rules)
        if is_projector(self.settings):
            raise UnsupportedModelError(f"{KEY}: {method.name} has weights for classes of vLLM, and transformers runs {rules.name}")
        if rules.deepstack or getattr(getattr(rules, "facts", None), "beside", ()):
            raise UnsupportedModelError(f"{KEY}: vLLM's Transformers backend gives {rules.name} no features of later layers")
        both_ways = rules.sees_both_ways or getattr(getattr(rules, "facts", None), "bidirectional", False)
        if both_ways and current_platform.is_cpu():
            raise UnsupportedModelError(f"{KEY}: tokens of an image see each other in {rules.name}, and in vLLM on CPUs those before alone")
        if self.mrope:
            self.require_places(method, rules.name)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        marks, grids = kwargs.pop(FIELD, None), kwargs.get(GRID)
        if self.settings is None or marks is None:
            return super(CompressedModel, self).embed_multimodal(**kwargs)
        features = self._process_image_input(**kwargs) or []
        if len(features) != len(marks):
            raise CountMismatchError(f"vLLM gave features of {len(features)} images for {len(marks)}")
        places = [placed(mark, None if grids is None else grids[i]) for i, mark in enumerate(marks)]
        methods = [self.settings.of_request(int(mark[0]) or None) for mark in marks]
        pieces = [self.info.pieces(method, *place) for method, place in zip(methods, places)]
        width = features[0].shape[-1] + (COLUMNS if self.mrope else 0)

        def rows(i: int) -> torch.Tensor:
            whole = features[i].reshape(-1, features[i].shape[-1])
            if self.mrope:
                _, height, across = places[i][2]
                return with_places(methods[i], pieces[i].plans[0], whole, whole.shape[1], height // self.merge, across // self.merge)
            lengths = [p.shape.length for p in pieces[i].plans]
            if sum(lengths) != len(whole):
                raise CountMismatchError(f"vLLM gave {len(whole)} rows for an image that has {sum(lengths)}")
            parts = zip(pieces[i].plans, whole.split(lengths))
            return torch.cat([shortened(methods[i], p, f) for p, f in parts])

        return each_alone([Image(int(m[1]), f, p.kept, width) for m, f, p in zip(marks, features, pieces)], rows)

    def get_mm_lora_token_counts(self, **kwargs: Any) -> Any:
        return super(CompressedModel, self).get_mm_lora_token_counts(**kwargs)


REGISTERED = {"info": TransformersInfo, "dummy_inputs": multimodal.MultiModalDummyInputsBuilder}


# Called as vLLM's own are, which asks by that name whether a model is run by transformers.
@MULTIMODAL_REGISTRY.register_processor(TransformersProcessor, **REGISTERED)
class TransformersMultiModalForCausalLM(CompressedTransformers, backend.TransformersMultiModalForCausalLM):
    """Any family."""


@MULTIMODAL_REGISTRY.register_processor(TransformersProcessor, **REGISTERED)
class TransformersMultiModalMoEForCausalLM(CompressedTransformers, backend.TransformersMultiModalMoEForCausalLM):
    """Any family with experts."""
