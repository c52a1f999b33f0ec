"""Mixers and learned poolings of a TokenFLEX projector against slow transcriptions of their rules, place by place, in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import mllm_efficient as me
from mllm_efficient.compressors.mixing import MIXERS, POOLINGS, mixer_flops, pooling_flops, stripe
from mllm_efficient.trained.poolings import POOLERS, AttSets
from mllm_efficient.trained.projector import TokenFlexProjector

GRIDS = [(5, 7), (6, 6), (1, 3), (2, 2)]
D = 16


def layer_norm(x, module):
    """A vector's norm."""
    x = (x - x.mean()) / (x.var(unbiased=False) + module.eps).sqrt()
    return x * module.weight + module.bias


def places(plane):
    return [(i, j) for i in range(plane.shape[1]) for j in range(plane.shape[2])]


def by_place(plane, make):
    """(D', h, w) of what ``make`` makes of each place."""
    h, w = plane.shape[1:]
    return torch.stack([torch.stack([make(i, j) for j in range(w)], -1) for i in range(h)], -2)


def here(plane, i, j):
    """A place's channels, zeros beyond the border."""
    h, w = plane.shape[1:]
    return plane[:, i, j] if 0 <= i < h and 0 <= j < w else torch.zeros_like(plane[:, 0, 0])


def depthwise(plane, conv):
    """A depth-wise filter with zeros beyond the border."""
    kh, kw = conv.weight.shape[2:]
    tap = [(a, b) for a in range(kh) for b in range(kw)]
    return by_place(
        plane, lambda i, j: sum(conv.weight[:, 0, a, b] * here(plane, i + a - kh // 2, j + b - kw // 2) for a, b in tap) + conv.bias
    )


def pointwise(plane, conv):
    return by_place(plane, lambda i, j: conv.weight[:, :, 0, 0] @ plane[:, i, j] + conv.bias)


def normed(plane, module):
    return by_place(plane, lambda i, j: layer_norm(plane[:, i, j], module))


def around(plane, i, j, step=1):
    """The 3 x 3 neighbours inside the border."""
    h, w = plane.shape[1:]
    near = [(i + a * step, j + b * step) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    return [plane[:, a, b] for a, b in near if 0 <= a < h and 0 <= b < w]


def slow_pool(m, x):
    n = (x - x.mean()) / (x.var(unbiased=False) + m.norm.eps).sqrt() * m.norm.weight[:, None, None] + m.norm.bias[:, None, None]
    return by_place(x, lambda i, j: x[:, i, j] + m.scale[:, 0, 0] * (sum(around(n, i, j)) / len(around(n, i, j)) - n[:, i, j]))


def slow_raft(m, x):
    h, w, side = *x.shape[1:], m.side
    small = x if (h, w) == (side, side) else F.interpolate(x[None], (side, side), mode="bicubic", align_corners=False)[0]
    mixed, half = small, D // 2
    for axis in (0, 1):
        n = normed(mixed, m.norms[axis])
        out = torch.zeros_like(mixed)
        for c in range(half):
            for other in range(side):
                # both slots of the channel along the whole row or column, slot by slot
                line = torch.cat([n[r * half + c, :, other] if axis == 0 else n[r * half + c, other] for r in (0, 1)])
                made = m.down[axis].weight @ F.gelu(m.up[axis].weight @ line + m.up[axis].bias) + m.down[axis].bias
                for r in (0, 1):
                    target = out[r * half + c, :, other] if axis == 0 else out[r * half + c, other]
                    target.copy_(made[r * side : (r + 1) * side])
        mixed = mixed + out
    change = mixed - small
    return x + (change if (h, w) == (side, side) else F.interpolate(change[None], (h, w), mode="bicubic", align_corners=False)[0])


def slow_strip(m, x):
    y = pointwise(depthwise(F.gelu(normed(x, m.first[0])), m.first[2]), m.first[3])
    y = F.gelu(normed(y, m.first[4]))
    a, b = y[: D // 2], y[D // 2 :]
    groups = D // 8

    def along(plane, axis):
        h, w = plane.shape[1:]
        out = torch.zeros_like(plane)
        for c in range(D // 2):
            g = c % groups  # patches share the weights of their groups
            for i in range(h):
                for j in range(w):
                    total = m.biases[axis][g].clone()
                    for near in (-1, 0, 1):
                        for far in range(w if axis == 0 else h):
                            p, q = (i + near, far) if axis == 0 else (far, j + near)
                            if 0 <= p < h and 0 <= q < w:
                                distance = far - (j if axis == 0 else i)
                                distance = max(1 - m.side, min(m.side - 1, distance))
                                total += m.tables[axis][g, near + 1, distance + m.side - 1] * plane[c, p, q]
                    out[c, i, j] = total
        return out

    rows = F.gelu(normed(pointwise(torch.cat([a, along(a, 0)]), m.back[0]), m.back[1]))
    first = pointwise(torch.cat([a, along(rows, 1)]), m.whole)
    mean = torch.stack([b[:, i, j] for i, j in places(b)]).mean(0)
    share = m.weigh[2].weight @ F.gelu(m.weigh[0].weight @ mean + m.weigh[0].bias) + m.weigh[2].bias
    share = share.view(3, D // 2).softmax(0)[..., None, None]
    second = share[0] * depthwise(b, m.strips[0]) + share[1] * depthwise(b, m.strips[1]) + share[2] * b
    return x + pointwise(torch.cat([first, second]), m.last)


def moved(plane, down, right):
    return by_place(plane, lambda i, j: here(plane, i - down, j - right))


def slow_shift(m, x):
    h, w = x.shape[1:]
    total = torch.zeros_like(x)
    first = 0
    for group, (size, d) in enumerate(zip((4, 3, 3, 3, 3), (-2, -1, 0, 1, 2))):
        part = x[first : first + size]
        across, down = (max(-((n - 1) // 2), min((n - 1) // 2, d)) for n in (w, h))
        total[first : first + size] += depthwise(moved(part, 0, across), m.filters[group])
        total[first : first + size] += depthwise(moved(part, down, 0), m.filters[5 + group])
        first += size
    return x + pointwise(normed(total, m.norm), m.last)


def slow_csw(m, x):
    h, w = x.shape[1:]
    half, dim = D // 2, D // 2 // m.heads
    qkv = by_place(x, lambda i, j: m.qkv.weight @ layer_norm(x[:, i, j], m.norm) + m.qkv.bias).view(3, 2, half, h, w)
    halves = []
    for axis in (0, 1):  # vertical stripes, then horizontal ones
        q, k, v = qkv[:, axis]
        wide = stripe(w if axis == 0 else h)
        out = torch.zeros_like(q)
        for i, j in places(x):
            number = (j if axis == 0 else i) // wide
            inside = [(a, b) for a, b in places(x) if (b if axis == 0 else a) // wide == number]
            for head in range(m.heads):
                of = slice(head * dim, (head + 1) * dim)
                weights = torch.stack([q[of, i, j] @ k[of, a, b] for a, b in inside]).mul(dim**-0.5).softmax(0)
                out[of, i, j] = sum(each * v[of, a, b] for each, (a, b) in zip(weights, inside))
            kernel = m.local[axis].weight[:, 0] if axis == 0 else m.local[axis].weight[:, 0].transpose(1, 2)
            near = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (i + a, j + b) in inside]
            out[:, i, j] += sum(kernel[:, a + 1, b + 1] * v[:, i + a, j + b] for a, b in near) + m.local[axis].bias
        halves.append(out)
    y = torch.cat(halves)
    return x + by_place(y, lambda i, j: m.last.weight @ y[:, i, j] + m.last.bias)


def slow_dwconv(m, x):
    n = normed(x, m.norm)
    most = by_place(n, lambda i, j: torch.stack(around(n, i, j)).amax(0))
    return x + depthwise(n, m.filter) + m.scale * (most - n)


SLOW_MIXERS = {"pool": slow_pool, "raft": slow_raft, "strip": slow_strip, "shift": slow_shift, "csw": slow_csw, "dwconv": slow_dwconv}


def cells_of(plane, side):
    """Of each cell of adaptive pooling, its places."""
    h, w = plane.shape[1:]
    for i in range(side):
        for j in range(side):
            rows = range(math.floor(i * h / side), math.ceil((i + 1) * h / side))
            yield [(a, b) for a in rows for b in range(math.floor(j * w / side), math.ceil((j + 1) * w / side))]


def slow_tap(m, x, side):
    logits = by_place(x, lambda i, j: sum(m.first.weight[:, :, a, b] @ here(x, i + a - 1, j + b - 1) for a in range(3) for b in range(3)))
    logits = normed(logits, m.norm)
    tap = [(a, b) for a in range(3) for b in range(3)]
    logits = by_place(
        logits, lambda i, j: sum(m.second.weight[:, :, a, b] @ here(logits, i + a - 1, j + b - 1) for a, b in tap) + m.second.bias
    )

    def mixed(i, j):
        share = logits[:, i, j].softmax(0)
        means = [sum(around(x, i, j, d)) / len(around(x, i, j, d)) for d in (1, 2, 3)]
        return share[0] * x[:, i, j] + sum(s * mean for s, mean in zip(share[1:], means))

    y = by_place(x, mixed)
    return torch.stack([torch.stack([y[:, a, b] for a, b in cell]).mean(0) for cell in cells_of(x, side)])


def slow_attsets(m, x, side):
    out = []
    for cell in cells_of(x, side):
        members = torch.stack([x[:, a, b] for a, b in cell])
        out.append(((members @ m.score.weight.T).softmax(0) * members).sum(0))
    return torch.stack(out)


def power(raw):
    return math.log1p(math.exp(raw.item())) + 0.01


def slow_mean(members, p):
    return members.clamp(min=1e-6).pow(p).mean(0).pow(1 / p)


def slow_ggem(m, x, side):
    least = x.amin((1, 2))
    return torch.stack(
        [slow_mean(torch.stack([x[:, a, b] - least for a, b in cell]), power(m.power[0])) + least for cell in cells_of(x, side)]
    )


def slow_regional_gem(m, x, side):
    least = x.amin((1, 2))
    h, w = x.shape[1:]

    def inside(i, n):
        if min(h, w) > 2:
            return -i if i < 0 else 2 * (n - 1) - i if i >= n else i
        return max(0, min(n - 1, i))

    def region(i, j):
        near = [x[:, inside(i + a, h), inside(j + b, w)] - least for a in range(-2, 3) for b in range(-2, 3)]
        return (slow_mean(torch.stack(near), power(m.region[0])) + (x[:, i, j] - least).clamp(min=1e-6)) / 2

    y = by_place(x, region)
    return torch.stack([slow_mean(torch.stack([y[:, a, b] for a, b in cell]), power(m.power[0])) + least for cell in cells_of(x, side)])


def slow_prefix(m, x, side):
    h, w = x.shape[1:]
    out = []
    for query, place in zip(m.queries[: side * side], m.place[0]):
        scores = []
        for i, j in places(x):
            y, z = (i + 0.5) / h, (j + 0.5) / w
            near = place[0] * y + place[1] * z + place[2] * y * y + place[3] * z * z
            scores.append(query @ (m.key.weight @ layer_norm(x[:, i, j], m.norm)) * D**-0.5 + near)
        weights = torch.stack(scores).softmax(0)
        out.append(sum(each * x[:, i, j] for each, (i, j) in zip(weights, places(x))))
    return torch.stack(out)


SLOW_POOLINGS = {
    "tap": slow_tap, "attsets": slow_attsets, "ggem": slow_ggem, "regional_gem": slow_regional_gem, "prefix": slow_prefix,
}  # fmt: skip


def projector(width=D, **settings):
    """One with weights that are all drawn, those that begin at zero too."""
    torch.manual_seed(0)
    module = TokenFlexProjector(width, 12, **settings).double().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("mixer", "pooler")) and "place" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("mixer", MIXERS[1:])
def test_a_mixer_equals_its_rule(mixer, grid):
    module = projector(mixer=mixer, **({"mixer_side": 4} if mixer in ("raft", "strip") else {})).mixer
    x = torch.randn(2, D, *grid, dtype=torch.float64)
    with torch.no_grad():
        out = module(x)
        for one, given in zip(out, x):
            torch.testing.assert_close(one, SLOW_MIXERS[mixer](module, given), atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_raft_at_its_own_size_does_not_resample():
    module = projector(mixer="raft", mixer_side=4).mixer
    x = torch.randn(1, D, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(module(x)[0], slow_raft(module, x[0]), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pooling", POOLERS)
def test_a_pooling_equals_its_rule(pooling, grid, side):
    module = projector(pooling=pooling)
    x = torch.randn(2, D, *grid, dtype=torch.float64)
    with torch.no_grad():
        out = module.pool(x.flatten(2).transpose(1, 2), side, grid)
        for one, given in zip(out, x):
            # powers are taken in float32
            wanted = SLOW_POOLINGS[pooling](module.pooler, given, side)
            torch.testing.assert_close(one, wanted, atol=1e-4 if "gem" in pooling else 1e-6, rtol=1e-5)


@pytest.mark.parametrize("width", [64, 192])
def test_groups_and_heads_of_64_channels_do_not_see_each_other(width):
    """What several groups make of all channels is what one makes of its own."""
    for pooling in ("ggem", "prefix"):
        module = projector(width, pooling=pooling)
        x = torch.randn(1, 9, width, dtype=torch.float64)
        with torch.no_grad():
            if pooling == "prefix":
                module.pooler.key.weight.zero_()  # places alone
            whole = module.pool(x, 2)
            other = x.clone()
            other[..., 64:] += 1.0
            torch.testing.assert_close(module.pool(other, 2)[..., :64], whole[..., :64])


def test_every_mixer_begins_as_the_projector_without_one_and_learns():
    x = torch.randn(2, 35, D)
    torch.manual_seed(0)
    plain = TokenFlexProjector(D, 12)
    for mixer in MIXERS[1:]:
        module = TokenFlexProjector(D, 12, mixer=mixer)
        missing, unknown = module.load_state_dict(plain.state_dict(), strict=False)
        assert not unknown and all(name.startswith("mixer.") for name in missing) and missing
        out = module(x, side=3, grid=(5, 7))
        assert torch.equal(out, plain(x, side=3, grid=(5, 7)))
        assert torch.equal(module(x, grid=(5, 7)), plain(x))
        out.square().sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.mixer.parameters())
        optimizer = torch.optim.SGD(module.parameters(), 1e-3)
        optimizer.step()
        module.zero_grad()
        module(x, side=3, grid=(5, 7)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.mixer.parameters()), mixer


def test_attsets_and_ggem_begin_as_the_average():
    x = torch.randn(2, 35, D)
    for pooling in ("attsets", "ggem"):
        module = TokenFlexProjector(D, 12, pooling=pooling)
        wanted = TokenFlexProjector(D, 12, pooling="adaptive").pool(x, 3, (5, 7))
        torch.testing.assert_close(module.pool(x, 3, (5, 7)), wanted, atol=1e-5, rtol=1e-5)
    assert TokenFlexProjector(D, 12, pooling="avg").config == TokenFlexProjector(D, 12).config


def test_gradients_reach_every_weight_of_a_pooling():
    for pooling in POOLERS:
        module = projector(pooling=pooling)
        module(torch.randn(2, 35, D, dtype=torch.float64), side=8, grid=(5, 7)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in module.parameters()), pooling


def test_a_set_of_frames_or_views_is_aggregated_whatever_its_order_and_number():
    module = AttSets(D)
    torch.nn.init.normal_(module.score.weight)
    frames = torch.randn(3, 7, 5, D)  # (places, ..., frames, D)
    order = torch.randperm(5)
    torch.testing.assert_close(module.aggregate(frames), module.aggregate(frames[:, :, order]))
    torch.testing.assert_close(module.aggregate(frames[:, :, :1]), frames[:, :, 0])
    outside = torch.tensor([False, False, False, True, True])[:, None].expand(3, 7, 5, 1)
    torch.testing.assert_close(module.aggregate(frames, outside), module.aggregate(frames[:, :, :3]))
    torch.testing.assert_close(module.aggregate(frames[:, :, :1].expand(3, 7, 4, D)), frames[:, :, 0])
    assert AttSets(2048).score.weight.numel() + AttSets(2048).down.weight.numel() == 2 * 2048 * 64


def test_ordered_tokens_do_not_depend_on_how_many_are_asked_for():
    module = projector(pooling="prefix")
    x = torch.randn(2, 35, D, dtype=torch.float64)
    whole = module(x, count=64, grid=(5, 7))
    for count in (1, 5, 36):
        torch.testing.assert_close(module(x, count=count, grid=(5, 7)), whole[:, :count])
    torch.testing.assert_close(module(x, side=5, grid=(5, 7)), whole[:, :25])
    with pytest.raises(me.MllmEfficientError, match="65 tokens of ordered ones that are 64"):
        module(x, count=65, grid=(5, 7))
    with pytest.raises(me.MllmEfficientError, match="is of ordered tokens"):
        TokenFlexProjector(D, 12)(x.float(), count=5, grid=(5, 7))


SETTINGS = [{"mixer": m} for m in MIXERS] + [{"pooling": p} for p in POOLINGS if p != "question"]  # which test_question.py asks
SETTINGS += [{"mixer": "csw", "pooling": "prefix", "queries": 9}]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_flops_equal_the_counter(settings):
    module, grid = TokenFlexProjector(128, 64, **settings), (5, 9)
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(3, 45, 128), side=3, grid=grid)
    added = mixer_flops(settings.get("mixer", "none"), 128, grid) + pooling_flops(settings.get("pooling", "bilinear"), 128, grid, 9)
    assert counter.get_total_flops() == 3 * (added + 2 * 9 * 3 * 128 * (2 * 128 + 64))


@pytest.mark.parametrize("settings, message", [
    ({"mixer": "rafts"}, "mixer='rafts' of a TokenFLEX projector: none, pool, raft.*raft"),
    ({"pooling": "tapp"}, "pooling='tapp' of a TokenFLEX projector"),
    ({"mixer": "pool", "mixer_side": 3}, "mixer_side=3 has no effect"), ({"queries": 3}, "queries=3 has no effect"),
    ({"mixer": "raft", "mixer_side": 0}, "a whole number from 1"), ({"pooling": "prefix", "queries": True}, "a whole number from 1"),
    ({"mixers": "raft"}, "no setting mixers .*mixer"),
])  # fmt: skip
def test_a_setting_that_is_wrong_is_one_line(settings, message):
    with pytest.raises(me.MllmEfficientError, match=message) as caught:
        me.TokenFlex(tokens=9, weights="random").module(16, 12, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings, width, message", [
    ({"mixer": "strip"}, 12, "strip cannot work on 12 channels: a multiple of 8"), ({"mixer": "raft"}, 7, "raft cannot work on 7"),
    ({"mixer": "shift"}, 4, "shift cannot work on 4"), ({"mixer": "csw"}, 5, "csw cannot work on 5"),
    ({"pooling": "ggem"}, 129, "ggem cannot work on 129"),
])  # fmt: skip
def test_a_width_that_cannot_be_divided_is_one_line(settings, width, message):
    with pytest.raises(me.MllmEfficientError, match=message):
        TokenFlexProjector(width, 12, **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_half_precision_projector_is_near_the_full_one(settings):
    module, x = projector(**settings), torch.randn(2, 35, D, dtype=torch.float64)
    with torch.no_grad():
        full = module(x, side=3, grid=(5, 7))
        half = module.bfloat16()(x.bfloat16(), side=3, grid=(5, 7))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), full, atol=0.1, rtol=0.1)
