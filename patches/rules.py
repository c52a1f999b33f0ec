"""What is known of a family from a model's configuration and its processor's settings alone: no torch, no transformers, no pixels.

``FAMILIES`` is the table of all families, one line each; a file of ``families`` holds both halves of one, ``Rules`` (here the base) and
``Adapter`` (its base in ``base``). Settings are those of the image processor, as ``preprocessor_config.json`` has them or
``processor_config.json`` under ``image_processor``, with ``vision_aspect_ratio`` of the processor itself. Where a model's files say
nothing, the family's released checkpoints count.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from mllm_efficient.errors import MllmEfficientError, UnsupportedModelError
from mllm_efficient.tokens import Grid, Plane, VisualShape

from .controls import Controlled
from .sizes import PLAIN, Decoder, ProjectorSize, Tower, decoder_of

if TYPE_CHECKING:
    from mllm_efficient.compressors.reducer import Reducer
    from mllm_efficient.family import Family

# model_type: (the model's class in transformers, the file in ``families`` and what its two halves are called before Rules and Adapter)
FAMILIES = {
    "llava": ("LlavaForConditionalGeneration", "llava:Llava"), "llava_next": ("LlavaNextForConditionalGeneration", "llava_next:LlavaNext"),
    "llava_next_video": ("LlavaNextVideoForConditionalGeneration", "llava_next_video:LlavaNextVideo"),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", "llava_onevision:LlavaOnevision"),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "qwen_vl:Qwen2VL"), "qwen3_vl": ("Qwen3VLForConditionalGeneration", "qwen_vl:Qwen3VL"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "qwen_vl:Qwen25VL"),
    "internvl": ("InternVLForConditionalGeneration", "internvl:InternVL"), "llama4": ("Llama4ForConditionalGeneration", "llama4:Llama4"),
    "idefics3": ("Idefics3ForConditionalGeneration", "smolvlm:Idefics3"), "smolvlm": ("SmolVLMForConditionalGeneration", "smolvlm:SmolVLM"),
    "minicpmv4_6": ("MiniCPMV4_6ForConditionalGeneration", "minicpm:MiniCPMV46"),
    "minicpmv4_7": ("MiniCPMV4_7ForConditionalGeneration", "minicpm:MiniCPMV47"),
    "mistral3": ("Mistral3ForConditionalGeneration", "mistral3:Mistral3"),
    "lighton_ocr": ("LightOnOcrForConditionalGeneration", "mistral3:LightOnOcr"),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "qwen_vl:Qwen35"),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "qwen_vl:Qwen35"),
    "glm46v": ("Glm46VForConditionalGeneration", "glm4v:Glm4V"), "glm4v": ("Glm4vForConditionalGeneration", "glm4v:Glm4V"),
    "glm4v_moe": ("Glm4vMoeForConditionalGeneration", "glm4v:Glm4V"), "glm_ocr": ("GlmOcrForConditionalGeneration", "glm4v:GlmOcr"),
    "gemma3": ("Gemma3ForConditionalGeneration", "gemma3:Gemma3"), "gemma4": ("Gemma4ForConditionalGeneration", "gemma4:Gemma4"),
    "cohere2_vision": ("Cohere2VisionForConditionalGeneration", "cohere2_vision:Cohere2Vision"),
}  # fmt: skip

Size = tuple[int, int]  # (width, height) in pixels
Settings = Mapping[str, Any]  # of an image processor
ANY_SIZE = (672, 672)  # an example for models that take images of any size


# ------------------------------------------------------------------------------------------------ one half of a family


@dataclass(frozen=True)
class Views:
    """One image or video as the model takes it, known by its size or by its number of tokens.

    shape: its tokens. unit: the grid that ``resize`` makes smaller, that of the image or of each tile in tokens.
    views: runs of the tower, each on ``patches`` (rows, columns). projected: tokens of a view that the projector takes.
    size: in pixels, where it was given. whole: whether the shape is known token by token; if not, N alone is right.
    also: patches of each view after the first, where views are not alike. says: all this in words.
    """

    shape: VisualShape
    unit: Grid
    views: int
    patches: Grid
    projected: int
    says: str
    size: Size | None = None
    whole: bool = True
    also: tuple[Grid, ...] = ()


class Rules(Controlled):
    """The base of all rules; a family overrides what is different with it. What ``plan`` and ``check`` ask is in ``Family``.

    counting: the processor's settings that decide how many tokens an image has. text_between: tokens of text that a prompt has at least
    between two images. packed: whether the tower computes attention over the patches of all images of a call and masks it. clip_tower:
    whether a tower with a class token is CLIP's, in whose space there is text. reads_values: whether the tower cannot run without values.
    heads_all: whether its head runs for every token of a prompt. sees_both_ways: whether tokens of an image see those after them, which the
    model is told by ``typed``. drops_patches: whether the tower can run on some of an image's patches, in their places.

    Args:
        name: of the model, for messages.
        config: of transformers, or ``sizes.Plain`` of a file.
        settings: of the image processor; empty where nothing is known of one.
    """

    gives: frozenset[str] = frozenset({"text", "grid"})
    fixed_count: ClassVar[bool] = False
    positions: str = "renumber"
    parts: frozenset[str] = frozenset()
    separators: ClassVar[bool] = False
    marks: ClassVar[bool] = False
    packed: ClassVar[bool] = False
    deepstack: bool = False
    mrope: bool = False
    projects: ClassVar[bool] = False
    counting: ClassVar[tuple[str, ...]] = ()
    text_between: ClassVar[int] = 1
    clip_tower: ClassVar[bool] = True
    sees_both_ways: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    heads_all: ClassVar[bool] = False
    drops_patches: ClassVar[bool] = False

    def __init__(self, name: str, config: Any, settings: Settings | None = None):
        self.name, self.config, self.settings = name, config, dict(settings or {})
        if "attention" in self.gives and self.class_token and self.clip_tower:
            self.gives = self.gives | {"clip_text"}
        if self.decoder in PLAIN_LAYERS:  # whose queries and keys can be made without positions
            self.gives = self.gives | {"heads"}

    def with_settings(self, settings: Settings) -> Any:
        """The same with other settings of the image processor."""
        other = copy.copy(self)
        other.settings = dict(settings)
        return other

    # ------------------------------------------------------------------------------------------ sizes of the parts

    @functools.cached_property
    def decoder_size(self) -> Decoder:
        return decoder_of(self.config, self.name)

    @functools.cached_property
    def tower_size(self) -> Tower:
        raise TypeError(f"{type(self).__name__} must define tower_size")

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        raise TypeError(f"{type(self).__name__} must define projector_size")

    @property
    def class_token(self) -> bool:
        """Whether the tower has one."""
        return self.tower_size.class_token

    @property
    def typed(self) -> str:
        """The argument of a call that says which columns are of images; "" where the language model reads none."""
        return "mm_token_type_ids" if self.mrope else ""

    @property
    def patch(self) -> int:
        """Pixels along a side of a patch."""
        return self.tower_size.patch

    @property
    def view_size(self) -> Size:
        """(width, height) in pixels of what the tower takes at once, on families whose tower takes one size."""
        side = self.config.vision_config.image_size
        return (side, side) if isinstance(side, int) else (side[1], side[0])

    @property
    def decoder(self) -> str:
        """The class of the decoder's layers, or the text model's kind where that is not known."""
        kind = str(self.config.text_config.model_type)
        return DECODERS.get(kind.removesuffix("_text"), kind)

    @property
    def decoder_layers(self) -> int:
        return self.config.text_config.num_hidden_layers

    @property
    def recurrent(self) -> tuple[str, ...]:
        """The kinds of decoder layers that carry a state along in place of keys and values, in words."""
        kinds = set(getattr(self.config.text_config, "layer_types", None) or ())
        return tuple(words for kind, words in RECURRENT.items() if kind in kinds)

    @property
    def deep_layers(self) -> int:
        """Decoder layers after which visual features are added (deepstack)."""
        return len(self.config.vision_config.deepstack_visual_indexes) if self.deepstack else 0

    @property
    def tower_blocks(self) -> int:
        """Blocks of the tower that methods can merge in; 0 where none can."""
        return 0

    def check_positions(self, rule: str) -> None:
        """Raises ``UnsupportedModelError`` for a rule of positions, "renumber" or "keep", that the model cannot follow."""

    def check_inside(self, method: Reducer) -> None:
        """Raises ``UnsupportedModelError`` where an in-decoder method cannot run in this model."""
        check_reducer(self, method)

    def require_counting(self, given: Settings) -> None:
        """Raises for settings that do not change how many tokens an image has."""
        for key in given:
            if key not in self.counting:
                has = f"{', '.join(self.counting)} have" if self.counting else "every picture has the same number"
                raise MllmEfficientError(f"{key} has no effect on the tokens of a picture on {self.name} ({has}): leave it out")

    # ------------------------------------------------------------------------------------------ images and their tokens

    @property
    def example_size(self) -> Size:
        """(width, height) of the image that tests and benchmarks take where none is given."""
        return self.view_size if self.fixed_count else ANY_SIZE

    def typical(self) -> list[Views]:
        """What a call has where nothing is said of it."""
        raise TypeError(f"{type(self).__name__} must define typical")

    def of_size(self, size: Size) -> Views:
        """An image of (width, height) pixels."""
        raise TypeError(f"{type(self).__name__} must define of_size")

    def of_tokens(self, n: int, exact: bool) -> list[Views]:
        """Images with n tokens in all. exact: whether the vision cost will be asked for."""
        raise TypeError(f"{type(self).__name__} must define of_tokens")

    def smaller(self, image: Views, unit: Grid) -> Views:
        """The image with a smaller ``unit``."""
        raise TypeError(f"{type(self).__name__} must define smaller")

    def together(self, image: Views, n: int) -> list[Views]:
        """n of an image in one prompt."""
        return [image] * n

    def unknown(self, n: int, like: Views, says: str) -> Views:
        """n tokens of whose places nothing is known, with the vision cost of another image."""
        return replace(like, shape=VisualShape((Plane(1, n),)), whole=False, says=says)

    def prompt(self, tokens: int | None, size: Size | None, exact: bool, images: int = 1) -> list[Views]:
        """The images of one prompt: by size, by number of tokens, or the usual. Both must agree.

        Args:
            tokens: of all images together.
            size: (width, height) of each in pixels.
            exact: whether the vision cost will be asked for.
            images: how many, all alike.

        Raises:
            MllmEfficientError: a number or size that the model cannot have.
        """
        if images < 1:
            raise MllmEfficientError(f"{images} images: at least 1")
        if images > 1:
            if tokens is not None:
                raise MllmEfficientError("visual tokens are of all pictures of a prompt together: give them or the number of images")
            return self.together(self.typical()[0] if size is None else self.of_size(size), images)
        if size is None:
            return self.typical() if tokens is None else self.of_tokens(tokens, exact)
        image = self.of_size(size)
        if tokens not in (None, image.shape.n):
            raise MllmEfficientError(f"a picture of {size[0]}x{size[1]} has {image.shape.n} tokens on {self.name}, not {tokens}")
        return [image]

    def usual(self) -> VisualShape | None:
        """The shape of every image where all have the same, else None."""
        return self.typical()[0].shape if self.fixed_count else None

    def item_of(self, shape: VisualShape) -> Any:
        """The usual image, of this shape."""
        return replace(self.typical()[0], shape=shape)

    def unit(self, item: Any) -> Grid:
        """The grid of the image, or of each of its tiles: what ``resize`` makes smaller."""
        return item.unit

    def shape_at(self, item: Any, grid: Grid) -> VisualShape:
        """The shape of the item if its ``unit`` grid were this one."""
        return self.smaller(item, grid).shape

    def projected(self, item: Any, side: int) -> VisualShape:
        """The image with side x side tokens for every view."""
        return VisualShape(tuple(Plane(side, side, tile=i) for i in range(item.views)))

    # ------------------------------------------------------------------------------------------ a processor without files

    def made_processor(self, tokenizer: Any, **common: Any) -> Any:
        """A processor for a model without files. common: what every processor of transformers takes.

        Raises ``UnsupportedModelError`` where the family has none.
        """
        kind = self.config.model_type
        raise UnsupportedModelError(f"--random-weights on a server: {kind} has no made-up processor; llava and llava_next have")


def rules_class(model_type: str) -> type[Rules]:
    """The rules of a family. model_type: a key of ``FAMILIES``."""
    return _half(model_type, "Rules")


def adapter_class(model_type: str) -> Any:
    """The adapter of a family, as ``rules_class``."""
    return _half(model_type, "Adapter")


@functools.cache
def _half(model_type: str, half: str) -> Any:
    module, _, name = FAMILIES[model_type][1].partition(":")
    return getattr(importlib.import_module(f"{__package__}.families.{module}"), name + half)


# ------------------------------------------------------------------------------------------------ what a decoder can be asked

ROUTER = "visual_router"  # name of a method's router in the decoder that it is put into
# Kind of a text model: the class of its layers, in which in-decoder methods work. A test runs the doctor's check on every one.
DECODERS = {
    "llama": "LlamaDecoderLayer", "mistral": "MistralDecoderLayer", "qwen2": "Qwen2DecoderLayer", "qwen3": "Qwen3DecoderLayer",
    "qwen2_vl": "Qwen2VLDecoderLayer", "qwen2_5_vl": "Qwen2_5_VLDecoderLayer", "qwen3_vl": "Qwen3VLTextDecoderLayer",
    "gemma": "GemmaDecoderLayer", "gemma2": "Gemma2DecoderLayer", "gemma3": "Gemma3DecoderLayer", "phi3": "Phi3DecoderLayer",
    "granite": "GraniteDecoderLayer", "olmo2": "Olmo2DecoderLayer", "olmo3": "Olmo3DecoderLayer", "qwen2_moe": "Qwen2MoeDecoderLayer",
    "qwen3_moe": "Qwen3MoeDecoderLayer", "mixtral": "MixtralDecoderLayer", "glm": "GlmDecoderLayer", "glm4": "Glm4DecoderLayer",
    "cohere": "CohereDecoderLayer", "cohere2": "Cohere2DecoderLayer", "gpt_oss": "GptOssDecoderLayer", "ernie4_5": "Ernie4_5DecoderLayer",
    "smollm3": "SmolLM3DecoderLayer", "starcoder2": "Starcoder2DecoderLayer", "stablelm": "StableLmDecoderLayer",
    "helium": "HeliumDecoderLayer", "exaone4": "Exaone4DecoderLayer",
}  # fmt: skip
PLAIN_LAYERS = frozenset(DECODERS[kind] for kind in PLAIN)


# kinds of layers, as ``layer_types`` of a configuration names them, whose state is of a whole prompt and not of single tokens
RECURRENT = {"linear_attention": "linear attention", "conv": "convolution", "mamba": "Mamba"}


def check_reducer(model: Family, method: Reducer) -> None:
    """Raises ``UnsupportedModelError`` for a decoder that an in-decoder method cannot work in."""
    if model.recurrent:
        raise UnsupportedModelError(
            f"{method.name} drops tokens between layers of attention, and {model.name} has layers of {' and '.join(model.recurrent)}, "
            "whose state holds every token: use a method that runs before the decoder"
        )
    if model.sees_both_ways:
        raise UnsupportedModelError(
            f"{method.name} drops tokens between layers under causal masks, and the tokens of an image of {model.name} see each other: use "
            "a method that runs before the decoder"
        )
    if model.decoder not in DECODERS.values():
        kind = model.decoder
        raise UnsupportedModelError(f"{method.name} works inside decoders of {', '.join(DECODERS)}, and this one is of {kind}")
    if not model.mrope:
        return
    if method.merges:
        raise UnsupportedModelError(f"{method.name} merges tokens, and a merged token has no place in the positions of {model.name}")
    if method.positions == "renumber":
        raise UnsupportedModelError(
            f"{method.name}: positions='renumber' has no meaning inside {model.name}, whose positions have three rows"
        )
    first, deep = min(method.stages(model.decoder_layers), default=model.decoder_layers), model.deep_layers
    if first < deep:
        raise UnsupportedModelError(
            f"{method.name} drops tokens at layer {first}, and {model.name} adds visual features up to layer {deep}: drop there or later"
        )
