"""MiniCPM-V 4.6 and 4.7: the whole image small, and slices of it, each of its own size, between marks and line breaks in the prompt."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from mllm_efficient.errors import MllmEfficientError, UnsupportedModelError
from mllm_efficient.lazy import torch
from mllm_efficient.tokens import Grid, Mark, Plane, VisualShape

from ..base import Encoding, Item, runs_in, smaller_pixels
from ..pictures import MODE
from ..rules import Rules, Settings, Size, Views
from ..sizes import Merger, ProjectorSize, Tower
from .generic import GenericAdapter

if TYPE_CHECKING:
    from torch import Tensor

MOST_SLICES = 9
MODES = {"4x": 2, "16x": 4}  # patches along a side of a token
NEWLINE = "\n"


class MiniCPMRules(Rules):
    """The shapes of MiniCPM-V. A slice's marks leave a prompt with its last token, a line break with its row of slices."""

    gives = frozenset({"text", "grid"})
    parts = frozenset({"tile"})
    marks = True
    reads_values = True
    counting: ClassVar[tuple[str, ...]] = ("max_slice_nums", "scale_resolution", "slice_mode", MODE)
    control = "downsample_mode and max_slice_nums"

    @functools.cached_property
    def tower_size(self) -> Tower:
        vision = self.config.vision_config
        side = getattr(vision, "window_kernel_size", (2, 2))[0]
        return Tower(
            vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads, vision.intermediate_size, vision.patch_size,
            getattr(vision, "num_channels", 3), merger=Merger(vision.insert_layer_id, side, vision.intermediate_size * side**2),
        )  # fmt: skip

    @functools.cached_property
    def projector_size(self) -> ProjectorSize:
        if getattr(self.config, "merger_times", 1) != 1:
            raise UnsupportedModelError(f"FLOPs are not known for the projector of {self.name}, which merges more than once")
        inputs = self.tower_size.width * 4
        return ProjectorSize(inputs, inputs, self.decoder_size.width)

    @property
    def mode(self) -> str:
        """ "16x" or "4x", of the processor's settings or the model's own."""
        return self.settings.get(MODE) or self.config.downsample_mode

    def crops(self, size: Size) -> tuple[Grid, Grid, Grid]:
        """(rows, columns) in tokens of the whole image, of the slices (0, 0 where there are none), and of each slice."""
        step, resolution = self.patch * merge_of(self.mode), self.settings.get("scale_resolution") or self.config.image_size
        slices = slices_of(size, self.settings, resolution)
        whole = fitted(size, resolution, step, enlarge=slices is None)
        if slices is None:
            return whole, (0, 0), (0, 0)
        rows, columns = slices
        each = nearest(size[0], columns) / columns, nearest(size[1], rows) / rows
        return whole, slices, fitted(each, resolution, step, enlarge=True)

    def shape(self, whole: Grid, slices: Grid, each: Grid) -> VisualShape:
        """Of an image with its slices."""
        rows, columns = slices
        planes = (Plane(*whole), *(Plane(*each, tile=1 + i) for i in range(rows * columns)))
        return VisualShape(planes, marks=slice_marks([len(plane) for plane in planes], columns))

    def _at(self, whole: Grid, slices: Grid, each: Grid, size: Size | None) -> Views:
        shape = self.shape(whole, slices, each)
        seen = f"{slices[1]} x {slices[0]} slices of {each[1]} x {each[0]}, " if slices[0] else ""
        said = f"{f'{size[0]}x{size[1]}: ' if size else ''}{seen}the whole as {whole[1]} x {whole[0]}, {shape.n} tokens"
        return self._seen(shape, said, size)

    def _seen(self, shape: VisualShape, says: str, size: Size | None) -> Views:
        """The views of an image, the whole first."""
        merge = merge_of(self.mode)
        patches, *also = [(plane.rows * merge, plane.columns * merge) for plane in shape.planes]
        whole = shape.planes[0]
        return Views(shape, (whole.rows, whole.columns), len(shape.planes), patches, len(whole), says, size, also=tuple(also))

    def typical(self) -> list[Views]:
        return [self.of_size(self.example_size)]

    def of_size(self, size: Size) -> Views:
        return self._at(*self.crops(size), size)

    def of_tokens(self, n: int, exact: bool) -> list[Views]:
        if exact:
            raise MllmEfficientError(f"{n} visual tokens are of no known picture on {self.name}: give --image-size WxH instead")
        return [self.unknown(n, self.typical()[0], f"{n} tokens")]

    def smaller(self, image: Views, unit: Grid) -> Views:
        return self._seen(scaled(image.shape, unit), image.says, None)

    def controls(self, size: Size, k: int) -> Iterable[Settings]:
        """Tokens of more or fewer patches, and fewer slices; of equal counts the model's own mode with most slices comes first."""
        most = self.settings.get("max_slice_nums") or MOST_SLICES
        modes = sorted(MODES, key=lambda mode: mode != self.mode)
        return [{MODE: mode, "max_slice_nums": slices} for mode in modes for slices in range(most, 0, -1)]

    def call_under(self, setting: Settings) -> dict[str, Any]:
        return {MODE: setting[MODE]} if MODE in setting else {}


def merge_of(mode: str) -> int:
    """Patches along a side of a token."""
    return MODES.get(mode, 4)


def nearest(length: float, divisor: int) -> int:
    """The nearest multiple, at least one."""
    return max(round(length / divisor) * divisor, divisor)


def fitted(size: tuple[float, float], resolution: int, step: int, enlarge: bool) -> Grid:
    """(rows, columns) of a picture that is made about ``resolution`` squared pixels large where it is larger, or ``enlarge``."""
    width, height = size
    if width * height > resolution**2 or enlarge:
        aspect = width / height
        height = int(resolution / math.sqrt(aspect))
        width = int(height * aspect)
    return nearest(height, step) // step, nearest(width, step) // step


def slices_of(size: Size, settings: Settings, resolution: int) -> Grid | None:
    """(rows, columns) of slices: about as many as the picture has ``resolution`` squared pixels, in the shape nearest its own."""
    most = settings.get("max_slice_nums") or MOST_SLICES
    wanted = min(math.ceil(size[0] * size[1] / resolution**2), most)
    if settings.get("slice_mode") is False or wanted <= 1:
        return None
    counts = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= most]
    aspect = math.log(size[0] / size[1])
    grids = [(rows, n // rows) for n in counts for rows in range(1, n + 1) if n % rows == 0]
    return min(grids, key=lambda grid: (abs(aspect - math.log(grid[1] / grid[0])), -grid[0]))


def slice_marks(counts: Sequence[int], columns: int) -> tuple[Mark, ...]:
    """What stands around the placeholders of each crop. counts: of the whole image, then of each slice, in rows of ``columns``.

    An image without slices always keeps what is around it, which is text like any other.
    """
    if len(counts) == 1:
        return ()
    ends = list(itertools.accumulate(counts, initial=0))
    spans, out = list(itertools.pairwise(ends)), list[Mark]()
    for i, (first, last) in enumerate(spans):
        opening, closing = ("<image>", "</image>") if i == 0 else ("<slice>", "</slice>")
        if i > 1 and (i - 1) % columns == 0:
            out.append(Mark(first, (NEWLINE,), ((spans[i - columns][0], first), (first, ends[-1]))))
        out += [Mark(first, (opening,), ((first, last),)), Mark(last, (closing,), ((first, last),))]
    return tuple(sorted(out, key=lambda mark: mark.before))


def scaled(shape: VisualShape, unit: Grid) -> VisualShape:
    """The shape whose whole image has the grid ``unit``, its slices made smaller alike."""
    whole = shape.planes[0]
    by = unit[0] / whole.rows, unit[1] / whole.columns
    planes = [replace(p, rows=max(1, round(p.rows * by[0])), columns=max(1, round(p.columns * by[1]))) for p in shape.planes[1:]]
    every = (replace(whole, rows=unit[0], columns=unit[1]), *planes)
    marks = slice_marks([len(plane) for plane in every], columns_of(shape)) if shape.marks else ()
    return replace(shape, planes=every, marks=marks)


def columns_of(shape: VisualShape) -> int:
    """Slices in a row."""
    rows = 1 + sum(NEWLINE in mark.words for mark in shape.marks)
    return (len(shape.planes) - 1) // rows


class MiniCPMAdapter(GenericAdapter, MiniCPMRules):
    """What the wrapper needs to know of one MiniCPM-V model. Every crop of a video's frames is an item of its own."""

    def __init__(self, model: Any):
        super().__init__(model)
        self.gives, self.parts, self.counts_by_rule = MiniCPMRules.gives, MiniCPMRules.parts, True

    def _shapes(self, modality: str, inputs: dict[str, Any]) -> list[VisualShape]:
        if modality == "video":
            return super()._shapes(modality, inputs)
        merge = merge_of(inputs.get(MODE) or self.config.downsample_mode)
        sizes = iter([(int(h) // merge, int(w) // merge) for h, w in inputs["target_sizes"].tolist()])
        token, out = self.placeholders[modality], list[VisualShape]()
        for ids in inputs["input_ids"].tolist():
            for crops, columns in images_of(ids, token):
                grids = list(itertools.islice(sizes, crops))
                planes = tuple(Plane(*grid, tile=i) for i, grid in enumerate(grids))
                out.append(VisualShape(planes, marks=slice_marks([len(p) for p in planes], columns) if crops > 1 else ()))
        return [*out, *(VisualShape((Plane(*grid),)) for grid in sizes)]

    def shape_at(self, item: Item, grid: Grid) -> VisualShape:
        if item.shape.modality == "video":
            return super().shape_at(item, grid)
        return scaled(item.shape, grid)

    def encode(
        self, items: Sequence[Item], needs: frozenset[str] = frozenset(), grids: Sequence[Grid | None] | None = None
    ) -> list[Encoding]:
        if grids is None or not any(grids):
            return super().encode(items, needs)
        return [self._whole_or_smaller(i, items, grid) for i, grid in enumerate(grids)]

    def _whole_or_smaller(self, index: int, items: Sequence[Item], grid: Grid | None) -> Encoding:
        """One item alone, its crops made smaller where there is a grid for its first."""
        item, call = items[index], dict(items[index].arguments["call"])
        merge = merge_of(call.get(MODE) or self.config.downsample_mode)
        before = sum(len(other.shape.planes) for other in items[:index])
        sizes = call["target_sizes"][before : before + len(item.shape.planes)]
        start = int(call["target_sizes"][:before].prod(1).sum()) * self.patch
        strip = call["pixel_values"][..., start : start + int(sizes.prod(1).sum()) * self.patch]
        shape = item.shape if grid is None else self.shape_at(item, grid)
        if grid is not None:
            parts = strip.split([int(size.prod()) * self.patch for size in sizes], -1)
            strip = torch.cat([self._smaller(p, size.tolist(), plane, merge) for p, size, plane in zip(parts, sizes, shape.planes)], -1)
            sizes = torch.tensor([(plane.rows * merge, plane.columns * merge) for plane in shape.planes]).to(sizes)
        features, _ = self._run("image", {**call, "pixel_values": strip, "target_sizes": sizes})
        return Encoding(features, shape)

    def _smaller(self, strip: Tensor, size: Sequence[int], plane: Plane, merge: int) -> Tensor:
        """The strip (1, C, patch, patches x patch) of a crop of ``size`` (rows, columns) patches, made smaller."""
        p, (rows, columns) = self.patch, size
        picture = strip[0].unflatten(-1, (rows, columns, p)).permute(0, 2, 1, 3, 4).reshape(1, -1, rows * p, columns * p)
        small = smaller_pixels(picture, plane.rows * merge * p, plane.columns * merge * p)[0]
        return small.unflatten(1, (-1, p)).unflatten(-1, (-1, p)).transpose(1, 2).flatten(2)[None]

    def joined(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), -1 if name.startswith("pixel_values") else 0)

    def example(self, images: Sequence[Views], pixels: Callable[..., Tensor]) -> dict[str, Any]:
        merge = merge_of(self.mode)
        sizes = torch.tensor([(p.rows * merge, p.columns * merge) for image in images for p in image.shape.planes], dtype=torch.int32)
        channels = getattr(self.config.vision_config, "num_channels", 3)
        return {"pixel_values": pixels(1, channels, self.patch, int(sizes.prod(1).sum()) * self.patch), "target_sizes": sizes}

    def place(self, planes: tuple[Plane, ...], size: tuple[int, int], image_processor: Any) -> tuple[Plane, ...]:
        """The first sees the whole image, the others row by row a part of it."""
        settings = {name: getattr(image_processor, name, None) for name in self.counting}
        rows, columns = slices_of(size, settings, settings["scale_resolution"] or self.config.image_size) or (0, 0)
        if len(planes) != 1 + rows * columns:
            return planes
        cells = [(r / rows, c / columns, (r + 1) / rows, (c + 1) / columns) for r in range(rows) for c in range(columns)]
        return (planes[0], *(replace(plane, box=box) for plane, box in zip(planes[1:], cells)))


def images_of(ids: list[int], placeholder: int) -> list[tuple[int, int]]:
    """(crops, slices in a row) of each image of a prompt, by the text around its runs of placeholders.

    The slices of an image, two or more, are all opened by the same token, which is another than in front of the whole image, and closed
    by the same. Other runs are images of one crop.
    """
    runs = runs_in(ids, placeholder)
    out = list[tuple[int, int]]()
    while runs:
        slices = _slices_after(ids, runs)
        columns = len(slices) // (1 + sum(slices))
        regular = len(slices) > 1 and slices == [i > 0 and i % columns == 0 for i in range(len(slices))] and len(slices) % columns == 0
        out.append((1 + len(slices), columns) if regular else (1, 0))
        runs = runs[1 + len(slices) if regular else 1 :]
    return out


def _slices_after(ids: list[int], runs: list[tuple[int, int]]) -> list[bool]:
    """Of each run after the first that is a slice of its image: whether a line break stands in front of it."""
    out = list[bool]()
    (first, _), *rest = runs
    if not first or not rest:
        return out
    opening, closing = ids[rest[0][0] - 1], ids[rest[0][1]] if rest[0][1] < len(ids) else None
    for (_, stop), (start, end) in itertools.pairwise(runs):
        gap = ids[stop:start]
        fits = len(gap) == 2 or (len(gap) == 3 and out)
        closed = end < len(ids) and ids[end] == closing and (not out or gap[0] == closing)
        if not fits or gap[-1] != opening or opening == ids[first - 1] or not closed:
            break
        out.append(len(gap) == 3)
    return out


class MiniCPMV46Rules(MiniCPMRules):
    """MiniCPM-V 4.6, whose forward knows no ``logits_to_keep``."""

    heads_all = True


class MiniCPMV46Adapter(MiniCPMAdapter, MiniCPMV46Rules):
    """One MiniCPM-V 4.6 model."""


class MiniCPMV47Rules(MiniCPMRules):
    """MiniCPM-V 4.7: positions of three rows on the canvas that an image's slices form."""

    positions = "keep"
    mrope = True


class MiniCPMV47Adapter(MiniCPMAdapter, MiniCPMV47Rules):
    """One MiniCPM-V 4.7 model."""
