"""What the mixers and poolings of a trained projector are called, and their FLOPs in closed form: products and filters, without torch."""

from __future__ import annotations

import math

from ..errors import BadSettingError

MIXERS = ("none", "pool", "raft", "strip", "shift", "csw", "dwconv")
POOLINGS = ("bilinear", "adaptive", "tap", "attsets", "ggem", "regional_gem", "prefix", "question")
OVER = ("image", "views", "frames")  # what AttSets makes one set of tokens of, beyond the cells of a view
QUESTION = "question"  # the pooling that is shown the prompt's text
SIDED = ("raft", "strip")  # mixers with weights of places, which mixer_side counts
SIDE = 12  # of the grid that they are trained on
QUERIES = 64  # of the prefix pooling: the most tokens that it can give

RAFT_SLOTS = RAFT_EXPANSION = 2
STRIP_PATCHES = 4
SHIFTS = (-2, -1, 0, 1, 2)
CSW_HEAD = 32
DW_KERNEL = 5
TAP_BRANCHES = 4
HEAD = 64  # channels that share a power (ggem) or the weights of a query (prefix)
NARROW, LOW_RANK = 1152, 64  # widths above the first have attention weights of the second's rank (attsets)
QUESTION_RANK = 256  # the most products of a token and a question (question)


def require_width(what: str, width: int, of: int, least: int = 1) -> None:
    """Raises ``BadSettingError`` for a tower whose width a mixer or pooling cannot divide."""
    if width % of or width < least:
        raise BadSettingError(f"{what} cannot work on {width} channels: a multiple of {of} is wanted, at least {max(of, least)}")


def heads_of(width: int) -> int:
    """Heads of cross-shaped window attention, an even number."""
    return 2 * max(1, width // (2 * CSW_HEAD))


def stripe(side: int) -> int:
    """How wide a stripe of cross-shaped window attention is on a grid of so many columns."""
    return max(1, round(side / 4))


def groups_of(width: int) -> int:
    """Groups of channels of the poolings that have some: one for 64 channels, as the towers' heads have."""
    return max(1, width // HEAD)


def mixer_flops(name: str, width: int, grid: tuple[int, int], side: int = SIDE) -> int:
    """FLOPs of a mixer on one grid of (rows, columns)."""
    h, w = grid
    n, d = h * w, width
    if name == "raft":
        mixed = RAFT_SLOTS * side
        return 2 * (d // RAFT_SLOTS) * side * 4 * RAFT_EXPANSION * mixed**2
    if name == "strip":
        half = d // 2
        first = 2 * n * d * (9 + d)
        along = 2 * n * half * 3 * (2 * w - 1 + 2 * h - 1) + 2 * 2 * n * d * half
        strips = 2 * 2 * n * half * 21 + 2 * (half * (half // 2) + (half // 2) * 3 * half)
        return first + along + strips + 2 * n * d * d
    if name == "shift":
        sizes = [d // len(SHIFTS) + (i < d % len(SHIFTS)) for i in range(len(SHIFTS))]
        return sum(2 * 2 * n * size * (1 + 2 * abs(by)) ** 2 for size, by in zip(sizes, SHIFTS)) + 2 * n * d * d
    if name == "csw":
        return 8 * n * d * d + _stripes(h, w, d // 2) + _stripes(w, h, d // 2)
    if name == "dwconv":
        return 2 * n * d * DW_KERNEL**2
    return 0


def _stripes(long: int, wide: int, width: int) -> int:
    """Attention inside the stripes of one direction, and the filter on the values."""
    across = stripe(wide)
    stripes, members = math.ceil(wide / across), long * across
    return stripes * (4 * members**2 * width + 2 * members * width * 9)


def question_rank(width: int) -> int:
    """Products of a token of a tower of this width and a question."""
    return min(width, QUESTION_RANK)


def pooling_flops(name: str, width: int, grid: tuple[int, int], tokens: int, outputs: int = 0) -> int:
    """FLOPs of a pooling from one grid of (rows, columns) to so many tokens. outputs: width of the language model, for ``question``."""
    n = grid[0] * grid[1]
    if name == "tap":
        return 2 * n * 9 * TAP_BRANCHES * (width + TAP_BRANCHES)
    if name == "attsets":
        return attsets_flops(width, n)
    if name == "prefix":
        return 2 * n * width * width + 4 * n * tokens * width
    if name == QUESTION:
        return 2 * question_rank(width) * (2 * n * width + outputs)
    return 0


def attsets_flops(width: int, n: int) -> int:
    """FLOPs of the scores of n tokens in AttSets."""
    return 2 * n * width * (width if width <= NARROW else 2 * LOW_RANK)
