"""What published papers call FLOPs, under the papers' names, to reproduce their tables. Compare ratios alone with ``exact``.

Both count multiply-adds (MACs) of the language model's prefill and nothing else: no vision tower, projector,
compressor, head or decoding, and every head as if it had keys of its own.

divprune: Alvar et al., CVPR 2025, arXiv 2503.02175, after FastV: 4nd^2 + 2n^2 d + 2ndm per layer, two MLP matrices.
sparsevlm: Zhang et al., ICML 2025, arXiv 2410.04417: 4nd^2 + 2n^2 d + 3ndm per layer, three MLP matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..patches.sizes import Decoder

EXACT = "exact"
MATRICES = {"divprune": 2, "sparsevlm": 3}
CONVENTIONS = (EXACT, *MATRICES)


def prefill_macs(decoder: Decoder, lengths: Sequence[int], convention: str) -> int:
    """Multiply-adds of a prefill with ``lengths[i]`` tokens in layer i. convention: "divprune" or "sparsevlm"."""
    d, m, matrices = decoder.width, decoder.mlp_width, MATRICES[convention]
    return sum(4 * n * d * d + 2 * n * n * d + matrices * n * d * m for n in lengths)
