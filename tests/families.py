"""Tiny random models of every anyres, tiled and M-RoPE family, their processors and batches.

Nothing here imports the package under test.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from .families_models import (  # noqa: F401 (tests take them from here)
    MROPE_IDS,
    PAD,
    PINPOINTS,
    QWEN3_5_VISION,
    SPECIAL,
    TILE,
    VOCABULARY,
    WORDS,
    clip,
    cohere2_vision,
    gemma3,
    gemma4,
    gemma_text,
    glm,
    internvl,
    llama,
    llava_next,
    llava_next_video,
    llava_onevision,
    mrope_text,
    qwen2,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_5_text,
    qwen3_vl,
    siglip,
)

# Text that some families put between the tokens of an image, in the vocabulary of theirs alone.
MARKS = (
    "[IMG_BREAK]", "[IMG_END]", "<fake_token_around_image>", "<global-img>", "\n", "\n\n",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)  # fmt: skip
MARKED = {**VOCABULARY, **{token: len(VOCABULARY) + i for i, token in enumerate(MARKS)}}
torch.set_num_threads(1)

# I and V stand for the family's own image and video placeholders.
PROMPTS = {
    "one image": "user : I what is the big ring ? assistant :",
    "two images": "user : I is the ring in I red or blue ? assistant :",
    "text only": "user : what is a cross ? assistant :",
    "touching images": "user : I I are the rings green ? assistant :",
    "long text": "user : I " + "how many small blue rings are on the left of the red cross , " * 3 + "? assistant :",
    "video": "user : V how many rings are in the video ? assistant :",
    "image and video": "user : is the ring of I in V ? assistant :",
    "video and image": "user : in V is the ring of I ? assistant :",
}
# (width, height): five shapes of picture, each of them tiled in its own way by the pinpoints below.
ASPECTS = {"1:1": (40, 40), "2:1": (40, 20), "1:3": (20, 60), "7:5": (70, 50), "10:1": (70, 7)}
PICTURES = {
    "one image": ["7:5"],
    "two images": ["2:1", "1:3"],
    "touching images": ["1:3", "10:1"],
    "long text": ["1:1"],
    "image and video": ["10:1"],
    "video and image": ["2:1"],
}


# ------------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class Family:
    """One model class.

    newlines: whether its images have newline columns; mrope: whether positions have three rows; in_prompt: whether the prompt alone
    says which tiles are of one image, between <img> and </img>.
    settings: of its image processor, where they are not what a model without one is counted with. inside: whether methods can run inside
    its decoder; placeholder: where it is not the usual token; typed: what says which columns are of images, and lets those of one see
    each other, fixed: whether every image has as many tokens, stateful: whether layers of it carry a state along.
    marked: whether text stands between the tokens of an image.
    """

    name: str
    build: Callable[[], Any]
    processor: Callable[[Any], Any]
    image: str = "<image>"
    video: str | None = None
    newlines: bool = False
    mrope: bool = False
    tiled: bool = False
    in_prompt: bool = False
    settings: dict[str, Any] | None = None
    marked: bool = False
    placeholder: str = ""
    typed: str = ""
    fixed: bool = False
    inside: bool = True
    stateful: bool = False

    @property
    def rows(self) -> tuple[str, ...]:
        """The kinds of row this family takes."""
        return tuple(kind for kind, text in PROMPTS.items() if self.video or "V" not in text)

    @property
    def mixed(self) -> tuple[str, ...]:
        """A batch with everything in it, of which no two rows have as many tokens."""
        return ("one image", "two images", "text only", "long text", *(["video and image"] if self.video else []))

    @property
    def image_token(self) -> int:
        usual = "<IMG_CONTEXT>" if self.in_prompt and not self.marked else "<|image_pad|>" if self.mrope else "<image>"
        return VOCABULARY[self.placeholder or usual]

    @property
    def video_token(self) -> int:
        """-1, which is no token, where the family takes no videos here."""
        return VOCABULARY["<|video_pad|>" if self.mrope else "<video>"] if self.video else -1


@functools.cache
def _model(name: str, seed: int):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = EVERY[name].build().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # The decoder's matrices are larger: with 0.1 everywhere greedy decoding falls into short loops.
        for key, parameter in model.named_parameters():
            scale = 0.3 if ("language_model" in key or "text_model" in key) and parameter.ndim == 2 else 0.1
            parameter += torch.randn(parameter.shape, generator=generator) * scale
        model.lm_head.weight[: len(SPECIAL)] = 0  # answers hold no placeholder and no padding
        model.lm_head.weight[len(VOCABULARY) :] = 0
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    return model


def tiny(name: str, seed: int = 0):
    """A fresh copy of a family's tiny random model: no end of sequence, no placeholder and no padding in its answers."""
    return copy.deepcopy(_model(name, seed))


# ------------------------------------------------------------------------------------------------ processors


class Videos:
    """Stands in for transformers' video processors, which need torchvision: the frames come in their final size."""

    merge_size, temporal_patch_size, model_input_names = 2, 2, ["pixel_values_videos", "video_grid_thw"]

    def __init__(self, patch_size: int | None = None):
        self.patch_size = patch_size  # None: frames as they are; else flat patches, as the M-RoPE families take them

    def __call__(self, videos: Sequence[np.ndarray], **kwargs: Any) -> dict[str, Any]:
        frames = [torch.from_numpy(v).permute(0, 3, 1, 2).float() / 255 * 2 - 1 for v in videos]
        if self.patch_size is None:
            return {"pixel_values_videos": torch.stack(frames)}
        metadata = [
            transformers.video_utils.VideoMetadata(total_num_frames=len(v), fps=4.0, frames_indices=list(range(len(v)))) for v in videos
        ]
        patches = [patchify(f, self.patch_size) for f in frames]
        return {
            "pixel_values_videos": torch.cat([p for p, _ in patches]),
            "video_grid_thw": torch.tensor([grid for _, grid in patches]),
            "video_metadata": metadata,
        }


def patchify(frames: Tensor, patch: int, merge: int = 2) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames (F, C, H, W) as flat patches (t h w, C 2 patch patch) in the M-RoPE families' order, and (t, h, w)."""
    f, c, height, width = frames.shape
    t, h, w = f // 2, height // patch, width // patch
    blocks = frames.reshape(t, 2, c, h // merge, merge, patch, w // merge, merge, patch)
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, c * 2 * patch * patch), (t, h, w)


def unpatchify(flat: Tensor, grid: Sequence[int], patch: int, merge: int = 2) -> Tensor:
    """The inverse of ``patchify``."""
    t, h, w = (int(g) for g in grid)
    blocks = flat.reshape(t, h // merge, w // merge, merge, merge, -1, 2, patch, patch)
    return blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(2 * t, -1, h * patch, w * patch)


@functools.cache
def tokenizer(padding_side: str, marked: bool = False):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    core = Tokenizer(models.WordLevel(MARKED if marked else VOCABULARY, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", VOCABULARY["<s>"])])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side=padding_side,
        additional_special_tokens=[*SPECIAL[4:], *(MARKS if marked else ())], model_max_length=4096,
    )  # fmt: skip


class Cohere2Tiles:
    """Stands in for Cohere2 Vision's image processor, which needs torchvision: tiles row by row and, beside several, a thumbnail."""

    size, min_patches, max_patches, patch_size = {"height": 24, "width": 24}, 1, 4, 3  # patch_size: tokens along a side of a tile
    model_input_names = ("pixel_values", "num_patches")

    def fetch_images(self, images: Any) -> Any:
        return images

    def __call__(self, images: Any, **kwargs: Any) -> dict[str, Any]:
        rows = images if isinstance(images, list) else [images]
        tiles = [self.cut(image) for row in rows for image in (row if isinstance(row, list) else [row])]
        return {"pixel_values": torch.cat(tiles), "num_patches": [len(t) for t in tiles]}

    def to_dict(self) -> dict[str, Any]:
        return {"size": self.size, "min_patches": 1, "max_patches": self.max_patches}

    def cut(self, image: Image.Image) -> Tensor:
        across, down = self.canvas(*image.size)
        whole = image.resize((24 * across, 24 * down), Image.Resampling.BICUBIC)
        boxes = [(24 * c, 24 * r, 24 * c + 24, 24 * r + 24) for r in range(down) for c in range(across)]
        views = [whole.crop(box) for box in boxes] + ([image.resize((24, 24))] if len(boxes) > 1 else [])
        return torch.stack([torch.from_numpy(np.array(v)).permute(2, 0, 1).float() / 255 * 2 - 1 for v in views])

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows): what enlarges the image least, or else shrinks it least; of equal ones the first of the fewest tiles."""
        best: tuple[float, tuple[int, int]] | None = None
        for n in range(1, self.max_patches + 1):
            for columns in range(1, n + 1):
                if n % columns:
                    continue
                scale = min(24 * columns / width, 24 * (n // columns) / height)
                cost = scale if scale >= 1 else 1e9 - scale
                if best is None or cost < best[0]:
                    best = cost, (columns, n // columns)
        assert best is not None
        return best[1]


def named(plain: Any, names: dict[str, str]) -> Any:
    """A copy of a tokenizer that has a family's special tokens as attributes, and their ids."""
    out = copy.deepcopy(plain)
    for name, token in names.items():
        setattr(out, name, token)
        setattr(out, f"{name}_id", MARKED[token])
    return out


@functools.cache
def cohere2_tokenizer(padding_side: str):
    return named(
        tokenizer(padding_side),
        {"boi_token": "<img>", "eoi_token": "</img>", "image_token": "<IMG_CONTEXT>", "img_line_break_token": "<|vision_end|>"},
    )


@functools.cache
def internvl_tokenizer(padding_side: str):
    return named(
        tokenizer(padding_side),
        {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
    )


@functools.cache
def standing_in(cls: type) -> type:
    """The processor class with ``Videos`` allowed where a video processor belongs, and ``Cohere2Tiles`` where one of images does."""

    def check(self, argument_name, argument):
        if isinstance(argument, (Videos, Cohere2Tiles)):
            return type(argument)
        return cls.check_argument_for_proper_class(self, argument_name, argument)

    return type(cls.__name__, (cls,), {"check_argument_for_proper_class": check})


def llava_next_processor(side: str):
    pictures = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
    )
    return transformers.LlavaNextProcessor(
        image_processor=pictures, tokenizer=tokenizer(side), patch_size=6, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def llava_next_video_processor(side: str):
    pictures = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
    )
    return standing_in(transformers.LlavaNextVideoProcessor)(
        video_processor=Videos(), image_processor=pictures, tokenizer=tokenizer(side), patch_size=6,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def llava_onevision_processor(side: str):
    pictures = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 25, "width": 25}, image_grid_pinpoints=[[h // TILE * 25, w // TILE * 25] for h, w in PINPOINTS]
    )
    return standing_in(transformers.LlavaOnevisionProcessor)(
        image_processor=pictures, tokenizer=tokenizer(side), video_processor=Videos(), num_image_tokens=25,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip


def internvl_processor(side: str):
    pictures = transformers.GotOcr2ImageProcessorPil(
        size={"height": 24, "width": 24}, crop_to_patches=True, min_patches=1, max_patches=4, do_resize=True
    )
    return standing_in(transformers.InternVLProcessor)(
        image_processor=pictures, tokenizer=internvl_tokenizer(side), video_processor=Videos(), image_seq_length=9
    )


def cohere2_vision_processor(side: str):
    from transformers.models.cohere2_vision.processing_cohere2_vision import Cohere2VisionProcessor

    return standing_in(Cohere2VisionProcessor)(image_processor=Cohere2Tiles(), tokenizer=cohere2_tokenizer(side))


def qwen_processor(cls: str) -> Callable[[str], Any]:
    def make(side: str):
        pictures = transformers.Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 48}
        )
        return standing_in(getattr(transformers, cls))(image_processor=pictures, tokenizer=tokenizer(side), video_processor=Videos(4))

    return make


def glm_processor(side: str):
    """Its own processor; <img> and </img> stand around a video."""
    pictures = transformers.Glm46VImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 2 * 8 * 8 * 4, "longest_edge": 2 * 8 * 8 * 48}
    )
    words = named(tokenizer(side), {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})
    out = standing_in(transformers.Glm46VProcessor)(image_processor=pictures, tokenizer=words, video_processor=Videos(4))
    out.video_start_id, out.video_end_id = VOCABULARY["<img>"], VOCABULARY["</img>"]
    return out


def gemma3_processor(side: str, **settings: Any):
    pictures = transformers.Gemma3ImageProcessorPil(size={"height": 24, "width": 24})
    words = named(tokenizer(side), {"boi_token": "<img>", "eoi_token": "</img>", "image_token": "<IMG_CONTEXT>"})
    return transformers.Gemma3Processor(image_processor=pictures, tokenizer=words, image_seq_length=9, **settings)


def gemma4_processor(side: str):
    """At most 70 tokens an image, the fewest that its processor takes."""
    pictures = transformers.Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    tokens = {"boi_token": "<img>", "eoi_token": "</img>", "image_token": "<IMG_CONTEXT>"}
    words = named(tokenizer(side), {**tokens, "boa_token": "<pad>", "eoa_token": "<pad>", "audio_token": "<|vision_end|>"})
    return standing_in(transformers.Gemma4Processor)(
        feature_extractor=Videos(), image_processor=pictures, tokenizer=words, video_processor=Videos(), image_seq_length=70
    )


def _glm(name: str, family: str, **settings: Any) -> Family:
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return Family(name, functools.partial(glm, family, **settings), glm_processor, image, mrope=True, inside=False)


def _mrope(name: str, build: Callable, processor: str, video: str, **more: Any) -> Family:
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return Family(name, build, qwen_processor(processor), image, video, mrope=True, **more)


from .families_marked import idefics3, idefics3_processor, minicpm, minicpm_processor, mistral3, mistral3_processor  # noqa: E402

FRAMED = "<|vision_start|><|video_pad|><|vision_end|>"
FAMILIES = {
    f.name: f
    for f in (
        Family("llava_next", llava_next, llava_next_processor, newlines=True, tiled=True),
        Family("llava_next_video", llava_next_video, llava_next_video_processor, video="<video>", newlines=True, tiled=True),
        Family("llava_onevision", llava_onevision, llava_onevision_processor, video="<video>", newlines=True, tiled=True),
        Family("internvl", internvl, internvl_processor, image="<IMG_CONTEXT>", tiled=True, in_prompt=True, settings={"max_patches": 4}),
        Family(
            "cohere2_vision",
            cohere2_vision,
            cohere2_vision_processor,
            image="<IMG_CONTEXT>",
            tiled=True,
            in_prompt=True,
            settings={"max_patches": 4},
        ),
        Family(
            "idefics3",
            idefics3,
            idefics3_processor,
            tiled=True,
            in_prompt=True,
            marked=True,
            settings={"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}},
        ),
        Family("mistral3", mistral3, mistral3_processor, settings={"size": {"longest_edge": 48}}, marked=True),
        _mrope("qwen2_vl", qwen2_vl, "Qwen2VLProcessor", FRAMED),
        _mrope("qwen2_5_vl", qwen2_5_vl, "Qwen2_5_VLProcessor", FRAMED),
        _mrope("qwen3_vl", qwen3_vl, "Qwen3VLProcessor", "<|video_pad|>"),  # its processor frames every time step by itself
        _mrope("qwen3_5", qwen3_5, "Qwen3VLProcessor", "<|video_pad|>", inside=False, stateful=True),
        _glm("glm46v", "Glm46V"),  # its videos are tested apart: a call has images or videos
        Family("gemma3", gemma3, gemma3_processor, "<img>", placeholder="<IMG_CONTEXT>", typed="token_type_ids", fixed=True, inside=False),
    )
}
# Families that do less than all tests of ``FAMILIES`` ask: layers that carry a state, FLOPs that are not known.
APART = {
    f.name: f
    for f in (
        Family(
            "minicpmv4_6",
            minicpm,
            minicpm_processor,
            tiled=True,
            in_prompt=True,
            marked=True,
            inside=False,
            stateful=True,
            settings={"scale_resolution": 32, "max_slice_nums": 6},
        ),
    )
}
# Types that share the code of a family above, and one with at least 70 tokens an image: the methods' rules are not tried anew on them.
GLM_EXPERTS = dict(moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1)
ALIKE = {
    f.name: f
    for f in (
        _mrope("qwen3_5_moe", qwen3_5_moe, "Qwen3VLProcessor", "<|video_pad|>", inside=False, stateful=True),
        _glm("glm4v", "Glm4v"),
        _glm("glm4v_moe", "Glm4vMoe", **GLM_EXPERTS),
        _glm("glm_ocr", "GlmOcr"),
        Family(
            "gemma4",
            gemma4,
            gemma4_processor,
            "<IMG_CONTEXT>",
            placeholder="<IMG_CONTEXT>",
            typed="mm_token_type_ids",
            inside=False,
            settings={"max_soft_tokens": 70},
        ),
    )
}
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 24):  # which has it otherwise, so it is refused
    del ALIKE["gemma4"]
EVERY = {**FAMILIES, **APART, **ALIKE}
WITH_VIDEO = tuple(f.name for f in FAMILIES.values() if f.video)
MROPE = tuple(f.name for f in FAMILIES.values() if f.mrope)
STATEFUL = tuple(f.name for f in EVERY.values() if f.stateful)


# ------------------------------------------------------------------------------------------------ batches


def noise(seed: int, width: int, height: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def video(name: str, row: str) -> np.ndarray:
    """Frames (F, H, W, 3) of a row's video: three in a tile's size, or of a size of their own where the family takes any."""
    side = {"llava_onevision": 25}.get(name, TILE)
    count, height, width = (
        {"video": (4, 24, 40), "image and video": (6, 16, 24)}.get(row, (4, 32, 16)) if EVERY[name].mrope else (3, side, side)
    )
    seed = 1000 + list(PROMPTS).index(row)
    return torch.randint(0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8).numpy()


def pictures(row: str) -> list[Image.Image]:
    """The pictures of a row, all of different sizes."""
    first = 10 * list(PROMPTS).index(row)
    return [noise(first + i, *ASPECTS[aspect]) for i, aspect in enumerate(PICTURES.get(row, []))]


@functools.cache
def _processor(name: str, padding_side: str):
    return EVERY[name].processor(padding_side)


def process(name: str, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], videos: Sequence = (), padding_side: str = "left"):
    """The family's own processor on prompts in which I and V stand for placeholders, the pictures given row by row."""
    family = EVERY[name]
    words = [" ".join({"I": family.image, "V": family.video}.get(word, word) for word in text.split(" ")) for text in texts]
    nested = {
        "llava_onevision": [row for row in images if row],
        "gemma3": list(images) if any(images) else [],
        "gemma4": list(images) if any(images) else [],
    }
    given = nested[name] if name in nested else [picture for row in images for picture in row]
    call = {"images": given or None, "videos": list(videos) or None}
    out = _processor(name, padding_side)(text=words, return_tensors="pt", padding=True, **{k: v for k, v in call.items() if v is not None})
    if not family.typed:
        out.pop("token_type_ids", None)
    return dict(out)


def make(name: str, *rows: str, padding_side: str = "left") -> dict[str, Any]:
    """The inputs of a batch with these rows (keys of ``PROMPTS``). A row brings the same pixels into every batch it is in."""
    videos = [video(name, row) for row in rows if "V" in PROMPTS[row]]
    return process(name, [PROMPTS[row] for row in rows], [pictures(row) for row in rows], videos, padding_side)


def aspect_batch(name: str, aspect: str) -> dict[str, Any]:
    """One row with one picture of this shape."""
    return process(name, [PROMPTS["one image"]], [[noise(list(ASPECTS).index(aspect), *ASPECTS[aspect])]])


# ------------------------------------------------------------------------------------------------ the slow reference
