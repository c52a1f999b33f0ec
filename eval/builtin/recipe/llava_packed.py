"""The prefix that ``builtin-tiles`` and ``builtin-video`` make of pictures and videos, by the stock tower and packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mllm_efficient.loading.models import ModelOptions, load

from ..chat import USER, VOCABULARY
from ..llava_architectures import LOOK, PINPOINTS, TILE
from .packed_language import PackedLanguage, Prefix


@dataclass
class Seen:
    """What B prompts show. pixels: (tiles, 3, TILE, TILE) of all pictures, or (B, frames, 3, TILE, TILE) of a video each.

    sizes: (pictures, 2) height and width; None for videos. counts: pictures of each prompt.
    """

    pixels: Tensor
    sizes: Tensor | None
    counts: list[int]


def tiled(prompts: Sequence[Sequence[np.ndarray]]) -> Seen:
    """prompts: of each its pictures (H, W, 3), cut into tiles by the family's image processor."""
    from transformers import LlavaNextImageProcessorPil

    square = {"height": TILE, "width": TILE}
    processor = LlavaNextImageProcessorPil(
        **LOOK, size={"shortest_edge": TILE}, crop_size=square, image_grid_pinpoints=PINPOINTS, do_pad=False
    )
    done = [processor(images=[Image.fromarray(picture)]) for pictures in prompts for picture in pictures]
    pixels = torch.cat([torch.as_tensor(np.asarray(each["pixel_values"][0])) for each in done])
    sizes = torch.tensor([picture.shape[:2] for pictures in prompts for picture in pictures])
    return Seen(pixels, sizes, [len(pictures) for pictures in prompts])


def filmed(prompts: Sequence[Sequence[np.ndarray]]) -> Seen:
    """prompts: of each the frames of one video, resized to the tower's square."""
    frames = [[np.asarray(Image.fromarray(f).resize((TILE, TILE), Image.Resampling.BICUBIC)) for f in frames] for frames in prompts]
    pixels = torch.from_numpy(np.array(frames)).movedim(-1, 2).float()
    return Seen((pixels / 255 - 0.5) / 0.5, None, [1] * len(prompts))


@torch.no_grad()
def begun(model: Any) -> Any:
    """The same model with the decoder of ``builtin-qwen`` to begin with; its tower is random, and the projector orthogonal.

    A new decoder finds where things are by M-RoPE's rows and columns at once, and by positions of one axis not in a thousand steps;
    one that knows the words and what is asked for finds it while the tower learns to see. 20 gives features the length that the
    decoder expects.
    """
    decoder = load(ModelOptions(model="builtin-qwen", device="cpu")).model.model.language_model
    model.model.language_model.load_state_dict(decoder.state_dict())
    projector = model.model.multi_modal_projector
    torch.nn.init.orthogonal_(projector.linear_1.weight)
    torch.nn.init.orthogonal_(projector.linear_2.weight, 20.0)
    return model


class PackedLlava(PackedLanguage):
    """The tower runs stock, in the activations' type by autocast."""

    def features(self, seen: Seen) -> list[Tensor]:
        """Of each picture or video (n, D)."""
        model, config = self.model.model, self.model.config
        how = {
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if seen.sizes is None:
                return list(model.get_video_features(seen.pixels, **how).pooler_output)
            return list(model.get_image_features(seen.pixels, seen.sizes, **how).pooler_output)

    def prefix(self, inputs: Seen) -> Prefix:
        embed = self.model.model.language_model.embed_tokens.weight
        user = embed[[VOCABULARY[w] for w in USER]].to(self.dtype)
        found, rows = iter(self.features(inputs)), []
        for count in inputs.counts:
            rows.append(torch.cat([user, *(next(found).to(self.dtype) for _ in range(count))]))
        lengths = torch.tensor([len(row) for row in rows])
        embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        at = torch.arange(embeds.shape[1])
        return Prefix(embeds, [], at < lengths[:, None], at.expand(len(rows), 1, -1), lengths, len(USER))
