"""Relevance in CLIP's space: the prompt's words and the tower's patches, against transformers' own CLIP step by step."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import transformers

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.measure.counter import Counted, count
from mllm_efficient.measure.flops import cost, shape_of
from mllm_efficient.patches import adapter_for

from .. import families, families_reference
from ..conftest import VOCABULARY
from ..pairs import for_all
from .test_conditional import cosine, drawn, slow_dpp

ROWS = ("one image", "two images", "long text", "text only")
LENGTH, INTO = 8, 6  # of the text tower's pieces, and of CLIP's space


def save_clip(folder, width, words, seed=0):
    """A tiny random CLIP with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate(("<unk>", *sorted(set(words)), "<s>", "</s>"))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    config = transformers.CLIPConfig(
        text_config=dict(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=INTO, max_position_embeddings=LENGTH, bos_token_id=vocabulary["<s>"],
            eos_token_id=vocabulary["</s>"], pad_token_id=0,
        ),
        vision_config=dict(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
            projection_dim=INTO,
        ),
        projection_dim=INTO,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.CLIPModel(config).eval()
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """(folder, model) of a CLIP for towers of a width."""

    @functools.cache
    def make(width=32, seed=0):
        folder = tmp_path_factory.mktemp(f"clip{width}-{seed}")
        return str(folder), save_clip(folder, width, [w for w in (*VOCABULARY, *families.VOCABULARY) if w[0] != "<"], seed)

    return make


@pytest.fixture
def llava(make_llava, make_processor, tmp_path):
    """A tiny LLaVA that lies in a folder with its processor."""
    model = make_llava()
    model.save_pretrained(tmp_path / "llava")
    make_processor().save_pretrained(tmp_path / "llava")
    return transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()


@torch.no_grad()
def slow_relevance(clip, tower, words, tokenizer):
    """(N,) of patches (N, D) behind the tower's last norm: for each piece of the text minus the cosine, and their mean, in [0, 1]."""
    ids = tokenizer(words)["input_ids"]
    pieces = [ids[i : i + LENGTH] for i in range(0, len(ids), LENGTH)]
    of_text = []
    for piece in pieces:
        filled = torch.tensor([piece + [0] * (LENGTH - len(piece))])
        mask = torch.tensor([[1] * len(piece) + [0] * (LENGTH - len(piece))])
        of_text.append(clip.text_projection(clip.text_model(filled, attention_mask=mask).pooler_output)[0].double().numpy())
    patches = [clip.visual_projection(row).double().numpy() for row in tower]
    found = np.array([np.mean([-cosine(patch, text) for text in of_text]) for patch in patches])
    return (found - found.min()) / (found.max() - found.min())


def similarities(x):
    rows = [row.double().numpy() for row in x]
    return np.array([[cosine(a, b) for b in rows] for a in rows])


# ------------------------------------------------------------------------------------------------ the choice


@pytest.mark.once
@for_all("seed", range(200))
def test_it_is_the_slow_greedy_choice_by_determinants(seed):
    x, _, k = drawn(seed)
    draw = np.random.default_rng(seed + 1000)
    patches, said = draw.normal(size=(len(x), 5)), draw.normal(size=5)
    if seed % 3 == 0:
        patches[draw.integers(0, len(x), len(x) // 2)] = patches[0]
    relevance = np.array([-cosine(patch, said) for patch in patches])
    spread = relevance.max() - relevance.min()
    r = (relevance - relevance.min()) / spread if spread > 1e-6 else np.ones(len(x))
    s = np.array([[cosine(a, b) for b in x] for a in x])
    v = me.VisualTokens(torch.tensor(x), clip_text=torch.tensor(said), clip_patches=torch.tensor(patches))
    method = me.CDPruner(tokens=k, relevance="clip", clip="somewhere")
    assert method.select(v).tolist() == sorted(slow_dpp(r, s, k))
    together = method.compress_alike([v, v], [k, k])
    assert all(out.indices.tolist() == method.select(v).tolist() for out in together)


def test_it_says_what_it_is():
    method = me.build("cdpruner:tokens=9,relevance=clip,clip=some/where")
    assert method.needs == {"clip_text"} and me.CDPruner.needs == {"text"}
    assert (
        method.to_dict() == {"method": "cdpruner", "tokens": 9, "relevance": "clip", "clip": "some/where"}
        and me.build(method.spec()) == method
    )
    assert method.flops(100, 64, 9) == me.CDPruner(tokens=9).flops(100, 64, 9) - 2 * 100 * 64
    with pytest.raises(me.CountMismatchError, match="this row has none"):
        method.select(me.VisualTokens(torch.randn(20, 4), clip_patches=torch.randn(20, 3)))
    with pytest.raises(me.CountMismatchError, match="NaN or infinity"):
        method.select(me.VisualTokens(torch.randn(20, 4), clip_patches=torch.full((20, 3), torch.nan), clip_text=torch.randn(3)))


# ------------------------------------------------------------------------------------------------ in models


@pytest.mark.parametrize("layer", [-1, -2])
def test_llava_is_given_clips_own_embeddings(llava, clip, make_batch, layer):
    """Of a padded batch of rows with one image, two, a text of several pieces, and none: tokens kept, answers, and each row alone."""
    folder, reference = clip()
    llava.config.vision_feature_layer = layer
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch, spec = make_batch(*ROWS), f"cdpruner:tokens=9,relevance=clip,clip={folder}"
    said = {
        "one image": "user : what is the big ring ? assistant :",
        "two images": "user : is the ring in red or blue ? assistant :",
        "long text": "user : " + "how many small blue rings are on the left of the red cross , " * 3 + "? assistant :",
    }
    said = {kind: " ".join(word for word in words.split() if word in VOCABULARY) for kind, words in said.items()}  # no <unk>
    assert len(tokenizer(said["long text"])["input_ids"]) > 2 * LENGTH
    expected = []
    for kind, words in said.items():
        pixels = make_batch(kind)["pixel_values"]
        with torch.no_grad():
            hidden = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
            features = llava.model.get_image_features(pixels, return_dict=True).pooler_output
            towers = adapter_for(llava).tower.post_layernorm(hidden)
        for x, tower in zip(features, towers):
            expected.append(sorted(slow_dpp(slow_relevance(reference, tower, words, tokenizer), similarities(x), 9)))
    me.wrap(llava, spec)
    together = llava.generate(**batch, max_new_tokens=4)[:, batch["input_ids"].shape[1] :]
    report = me.last_report(llava)
    assert [image.indices.tolist() for image in report.images] == expected
    assert report.stages[0]["relevance"] == "clip"
    for row, kind in enumerate(ROWS):
        one = make_batch(kind)
        assert torch.equal(together[row], llava.generate(**one, max_new_tokens=4)[0, one["input_ids"].shape[1] :]), kind


def test_the_answer_is_not_read(llava, clip, make_batch):
    """With labels the words up to the answer count."""
    spec = f"cdpruner:tokens=5,relevance=clip,clip={clip()[0]}"
    batch = make_batch("one image")
    alone = me.prepare(llava, spec, **batch).report.images[0].indices
    answer = torch.tensor([[VOCABULARY["red"], VOCABULARY["cross"]]])
    ids = torch.cat([batch["input_ids"], answer], 1)
    labels = torch.cat([torch.full_like(batch["input_ids"], -100), answer], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": batch["pixel_values"]}
    assert torch.equal(me.prepare(llava, spec, labels=labels, **given).report.images[0].indices, alone)


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video"])
@pytest.mark.parametrize("aspect", ["1:1", "2:1", "7:5"])
def test_tiles_are_packed_as_their_features_are(clip, name, aspect, registered, tmp_path):
    """LLaVA-NeXT and pictures of LLaVA-NeXT-Video: the base view, then the map of tiles without its padding."""
    seen = []

    @me.register("recorder")
    @dataclass(frozen=True, kw_only=True)
    class Recorder(me.Selector):
        """Keeps what it is given."""

        needs: ClassVar[frozenset] = frozenset({"clip_text", "attention"})
        clip: str = ""

        def score(self, v):
            seen.append(v)
            return v.attention

    families.tiny(name).save_pretrained(tmp_path)
    families.FAMILIES[name].processor("left").tokenizer.save_pretrained(tmp_path)
    model = type(families.tiny(name)).from_pretrained(tmp_path).eval()
    folder, reference = clip(model.config.vision_config.hidden_size)
    inputs = families.aspect_batch(name, aspect)
    me.prepare(model, f"recorder:tokens=5,clip={folder}", **inputs)
    (v,) = seen
    pixels, side = inputs["pixel_values"].flatten(0, 1), tile_side(model)
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer][:, 1:]
        tiles = reference.visual_projection(tower.post_layernorm(hidden))
    size = inputs["image_sizes"][0]
    tiling = families_reference.canvas(model, size, True)
    places = families_reference.packed(name, model, size, tiling)[side * side :]
    places = places[places[:, 2] == 0]
    expected = [*tiles[0]]
    for row, column, _ in places.long().tolist():
        expected.append(tiles[1 + row // side * tiling[1] + column // side][row % side * side + column % side])
    torch.testing.assert_close(v.clip_patches, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert v.clip_text.shape == (INTO,) and v.attention is not None and v.keys.shape[1] > 1


def tile_side(model):
    return model.config.vision_config.image_size // model.config.vision_config.patch_size


def test_an_encoding_is_shared_by_methods_that_name_several_clips(llava, clip, make_batch):
    """The tower runs once; each method projects its output by its own CLIP."""
    from mllm_efficient.apply.prepare import encode

    batch = make_batch("one image")
    specs = [f"cdpruner:tokens=7,relevance=clip,clip={clip(32, seed)[0]}" for seed in (0, 1)]
    encoded = encode(llava, specs[0], **batch)
    rest = {k: v for k, v in batch.items() if k != "pixel_values"}
    found = [me.prepare(llava, spec, encoded=encoded, **rest).report.images[0].indices.tolist() for spec in specs]
    assert found == [me.prepare(llava, spec, **batch).report.images[0].indices.tolist() for spec in specs] and found[0] != found[1]
    with pytest.raises(me.MllmEfficientError, match="needs clip_text, which this encoding does not hold"):
        me.prepare(llava, specs[0], encoded=encode(llava, "divprune:tokens=7", **batch), **rest)


def test_nothing_stays_on_the_tower(llava, clip, make_batch):
    layers = adapter_for(llava).tower.encoder.layers
    batch = make_batch("one image")
    logits = llava(**batch).logits  # the first call puts transformers' own hooks there
    before = [len(layer._forward_hooks) for layer in layers]
    me.prepare(llava, f"cdpruner:tokens=5,relevance=clip,clip={clip()[0]}", **batch)
    assert [len(layer._forward_hooks) for layer in layers] == before and torch.equal(llava(**batch).logits, logits)


# ------------------------------------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize("name", ["llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_families_without_a_clip_tower_refuse_by_name(name):
    with pytest.raises(me.UnsupportedModelError, match=r"cdpruner needs clip_text, which \w+ does not give"):
        me.wrap(copy.deepcopy(families.tiny(name)), "cdpruner:tokens=4,relevance=clip,clip=somewhere")


def test_a_siglip_tower_and_a_projector_in_front_are_refused(make_llava):
    with pytest.raises(me.UnsupportedModelError, match="cdpruner needs clip_text, which LlavaForConditionalGeneration does not give"):
        me.wrap(make_llava(tower="siglip"), "cdpruner:tokens=4,relevance=clip,clip=somewhere")
    with pytest.raises(me.UnsupportedModelError, match="cdpruner needs clip_text of the tower's tokens, which the tokens of tokenflex"):
        me.wrap(make_llava(), "tokenflex:tokens=9,weights=random | cdpruner:tokens=4,relevance=clip,clip=somewhere")


def test_videos_refuse():
    with pytest.raises(me.UnsupportedModelError, match="frames of a video are pooled, and have no clip_text of the tower's own"):
        me.prepare(
            families.tiny("llava_next_video"), "cdpruner:tokens=4,relevance=clip,clip=x", **families.make("llava_next_video", "video")
        )


def test_a_folder_that_is_none_and_one_of_another_tower_are_one_line(llava, clip, make_batch, tmp_path):
    batch = make_batch("one image")
    for where, says in (
        (str(tmp_path / "none"), "no CLIP model with a tokenizer there"),
        (clip(24)[0], "belongs to a tower 24 wide, and this"),
    ):
        with pytest.raises(me.MllmEfficientError, match=says) as error:
            me.prepare(llava, f"cdpruner:tokens=4,relevance=clip,clip={where}", **batch)
        assert "\n" not in str(error.value)


def test_a_model_without_a_tokenizer_beside_it_is_one_line(make_llava, clip, make_batch):
    with pytest.raises(me.MllmEfficientError, match="reads the words of the question, and there is no tokenizer at ''"):
        me.prepare(make_llava(), f"cdpruner:tokens=4,relevance=clip,clip={clip()[0]}", **make_batch("one image"))


# ------------------------------------------------------------------------------------------------ what it costs, and commands


class SharedAlways(me.CDPruner):
    """As on a GPU, which looks at all tokens for every pick."""

    def select(self, v, k):
        return self.select_batch([v], k)[0]


@pytest.mark.parametrize("text_tokens", [3, 6, 7, 30])
def test_it_costs_what_torch_counts(llava, clip, text_tokens):
    """Text tower, both projections and the question's row: pieces of 8 tokens, of which two are CLIP's own."""
    spec = f"cdpruner:tokens=9,relevance=clip,clip={clip()[0]}"
    shape, call = shape_of(llava.config, "tiny"), {"text_tokens": text_tokens, "batch_size": 2, "new_tokens": 2}
    closed = cost(shape, method=spec, **call)
    found = count(llava, shape, me.build(spec), **call)
    assert 0 < found.compress <= closed.compress  # on a CPU, which looks at few tokens again
    assert found == Counted(closed.vision, found.compress, closed.prefill, closed.decode)
    shared = count(llava, shape, SharedAlways(tokens=9, relevance="clip", clip=str(clip()[0])), **call)
    assert shared == Counted(closed.vision, closed.compress, closed.prefill, closed.decode)


def test_commands_take_it(clip, tmp_path, capsys):
    from mllm_efficient.eval.builtin.architecture import VOCABULARY as WORDS

    folder = tmp_path / "clip"
    save_clip(folder, 128, [w for w in WORDS if w[0] != "<"])
    spec = f"cdpruner:tokens=36,relevance=clip,clip={folder}"
    assert main(["eval", "--limit", "7", "--method", spec, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    own = next(r for r in rows if r["method"] == spec and r["task"] == "overall")
    assert own["visual_tokens_kept"] == 36 and own["failures"] == 0
    assert main(["flops", "--model", "builtin", "--method", spec, "--method", "cdpruner:tokens=36", "--json"]) == 0
    none, by_clip, by_llm = json.loads(capsys.readouterr().out)["rows"]
    assert by_clip["compress_tflops"] > by_llm["compress_tflops"] > none["compress_tflops"]
    assert main(["eval", "--limit", "7", "--method", "cdpruner:tokens=36,relevance=clip"]) == 2
    assert "needs clip=DIR" in capsys.readouterr().err
