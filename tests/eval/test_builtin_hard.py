"""The harder embedded benchmark: frozen pictures and questions, right answers, regions, and nothing to be had without the images."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from mllm_efficient import MllmEfficientError
from mllm_efficient.eval.answers import choices, judge
from mllm_efficient.eval.builtin.hard import CATEGORIES, FORMS, make_item, vocabulary
from mllm_efficient.eval.builtin.hard import floor as floors
from mllm_efficient.eval.builtin.hard.canvas import PIXEL, STEP
from mllm_efficient.eval.builtin.hard.font import GLYPHS
from mllm_efficient.eval.builtin.hard.suite import HardSample, round_robin, samples, shuffled
from mllm_efficient.eval.builtin.scenes import SPLITS
from mllm_efficient.stats import TAIL, proportion
from mllm_efficient.tokens import Plane

from . import hard_oracle as oracle

pytestmark = pytest.mark.once

# sha256 over pictures and questions of items 0..24 of every category; a change means that published numbers no longer hold.
FROZEN = {
    "train": "c573e0ed52f3e2dc01169a742dc0171ad2fdf88966ce5462316237cf473f298f",
    "val": "a3ded4813752b3d7c23fefc2020a84cf87e91371cd96792105e5af8e8678e79e",
    "test": "c72cbd949d9cf1f384fd7083a8b7551637378125f23a1aa6f6b7f86c735c21c4",
}


def items(split: str, count: int):
    return [make_item(split, index, category) for category in CATEGORIES for index in range(count)]


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_questions_and_regions_never_change(split):
    digest = hashlib.sha256()
    for item in items(split, 25):
        for picture in item.pictures:
            digest.update(repr((picture.height, picture.width)).encode() + picture.draw().tobytes())
        for q in item.questions:
            boxes = [[(b.left, b.top, b.right, b.bottom) for b in boxes] for boxes in q.regions]
            digest.update(repr((q.form, q.text, q.answer, boxes)).encode())
    assert digest.hexdigest() == FROZEN[split]


def test_splits_share_no_picture():
    drawn = {split: {p.draw().tobytes() for item in items(split, 25) for p in item.pictures} for split in SPLITS}
    blank = {p.draw().tobytes() for split in SPLITS for item in items(split, 25) for p in item.pictures if not p.marks}
    assert all(drawn[a].isdisjoint(drawn[b] - blank) for a in SPLITS for b in SPLITS if a != b)


def test_sides_are_multiples_of_a_merged_token_of_many_sizes_and_aspects():
    for category in CATEGORIES:
        sizes = {(p.height, p.width) for i in range(60) for p in make_item("val", i, category).pictures}
        assert all(side % STEP == 0 and 112 <= side <= 336 for size in sizes for side in size)
        low = min(w / h for h, w in sizes)
        assert len(sizes) >= 9 and low < 0.8 and max(w / h for h, w in sizes) > 1.25
        for i in range(60):
            assert len({(p.height, p.width) for p in make_item("val", i, category).pictures}) == 1


@pytest.mark.parametrize("category", CATEGORIES)
def test_drawing_is_that_of_a_loop_over_pixels(category):
    """Also at another size than the picture's own; noise apart, which is added to whole pictures."""
    item = next(i for i in items("val", 30) if i.category == category and min(p.ground.noise for p in i.pictures) == 0)
    picture = item.pictures[-1]
    for height, width in ((picture.height, picture.width), (50, 37)):
        image = picture.draw(height, width)
        for row in range(0, height, 5):
            for column in range(1, width, 5):
                y, x = (2 * row + 1) * picture.height // height, (2 * column + 1) * picture.width // width
                point = np.array([[x]]), np.array([[y]])
                rgb = picture.ground.paint(*point, PIXEL * picture.width, PIXEL * picture.height)[0, 0]
                for mark in picture.marks:
                    rgb = mark.rgb if mark.covers(*point)[0, 0] else rgb
                assert tuple(image[row, column]) == tuple(np.clip(rgb, 0, 255))


def test_noise_is_of_mean_zero_and_the_amplitude_that_a_picture_says():
    noisy = [p for i in items("val", 30) for p in i.pictures if p.ground.noise]
    assert len(noisy) > 10
    for picture in noisy[:5]:
        grain = picture.ground.grain((picture.height, picture.width, 3))
        assert abs(grain.mean() + 0.5) < 0.3  # the division rounds down
        assert grain.std() == pytest.approx(picture.ground.noise * math.sqrt(4 * (256**2 - 1) / 12) / 256, rel=0.05)


def test_glyphs_are_different_and_large_enough():
    assert len({g.tobytes() for g in GLYPHS.values()}) == len(GLYPHS)
    letters = {c for item in items("val", 30) for p in item.pictures for t in oracle.texts(p) for c in t.text.upper()}
    assert letters <= GLYPHS.keys()
    assert min(t.box.bottom - t.box.top for i in items("val", 30) for p in i.pictures for t in oracle.texts(p)) >= 7 * PIXEL


def test_every_word_is_in_the_vocabulary_and_every_form_is_asked():
    known, asked = vocabulary(), Counter[str]()
    assert len(set(known)) == len(known)
    for item in items("val", 100):
        for q in item.questions:
            asked[q.form] += 1
            assert {*re.findall(r"\w+|[^\w\s]", q.text.lower()), q.answer} <= set(known)
            assert q.answer in q.answers and q.category == item.category and len(q.regions) == len(item.pictures)
    assert asked.keys() == FORMS.keys()


# ---------------------------------------------------------------------------------------------- right, and where


def test_what_is_drawn_answers_every_question():
    for item in items("val", 120):
        for q in item.questions:
            assert oracle.answer(q, item.pictures) == q.answer, (item.category, item.index, q.text)


def test_the_regions_hold_what_the_answer_needs():
    """What lies outside them can go; without what lies in them the pictures are others."""
    for item in items("val", 20):
        for q in item.benchmark:
            kept = [oracle.within(p, boxes) for p, boxes in zip(item.pictures, q.regions)]
            assert oracle.answer(q, kept) == q.answer, (item.index, q.text)
            for picture, boxes, alone in zip(item.pictures, q.regions, kept):
                before, rest = picture.draw(), oracle.within(picture, boxes, inside=False).draw()
                assert bool(boxes) is bool((before != rest).any()), (item.index, q.text)
                same = (before == alone.draw()).all(-1)
                for top, left, bottom, right in map(picture.fraction, boxes):
                    rows = slice(round(top * picture.height), round(bottom * picture.height))
                    assert same[rows, round(left * picture.width) : round(right * picture.width)].all()


def test_only_what_is_absent_has_no_region():
    for item in items("val", 60):
        for q in item.questions:
            absent = (q.form, q.answer) in {("presence", "no"), ("few", "0")}
            assert any(q.regions) is not absent


def test_screens_are_exactly_flat_and_differ_in_one_element_alone():
    for index in range(40):
        item = make_item("val", index, "screens")
        drawn = [p.draw() for p in item.pictures]
        for picture, image in zip(item.pictures, drawn):
            assert (oracle.within(picture, [], inside=True).draw() == picture.ground.rgb).all()
            assert (image == picture.ground.rgb).all(-1).mean() > 0.5
        (last,) = [q for q in item.questions if q.form == "element"]
        differ = (drawn[-2] != drawn[-1]).any(-1)
        assert differ.any()
        for boxes in last.regions[-2:]:
            inside = np.zeros_like(differ)
            for box in boxes:
                inside[box.top // PIXEL : box.bottom // PIXEL, box.left // PIXEL : box.right // PIXEL] = True
            differ &= ~inside
        assert not differ.any()


def test_scenes_have_one_to_thirty_objects_and_grounds_of_three_kinds():
    scenes = [make_item("val", index, "scene").pictures[0] for index in range(600)]
    assert {len(p.marks) for p in scenes} == set(range(1, 31))
    kinds = Counter((any(p.ground.slope), p.ground.noise > 0) for p in scenes)
    assert min(kinds[k] for k in ((False, False), (True, False), (True, True))) > 150


def test_things_of_a_still_picture_do_not_touch():
    for item in (*(make_item("val", i, "scene") for i in range(60)), *(make_item("val", i, "images") for i in range(60))):
        for picture in item.pictures:
            found = oracle.things(picture)
            for i, a in enumerate(found):
                assert a.radius < a.x < PIXEL * picture.width - a.radius and a.radius < a.y < PIXEL * picture.height - a.radius
                assert all(math.dist((a.x, a.y), (b.x, b.y)) > a.radius + b.radius for b in found[:i])


# ---------------------------------------------------------------------------------------------- nothing without the images


@pytest.fixture(scope="module")
def asked():
    return {c: samples("test", categories=[c]) for c in CATEGORIES}


@pytest.fixture(scope="module")
def found(asked):
    return {c: floors.floor_of(c, [s.question for s in asked[c]]) for c in CATEGORIES}


def test_floors_are_near_chance(found):
    for f in found.values():
        assert f.questions == 1000
        assert f.chance <= f.upper and f.floor <= f.chance + 4
    assert max(f.floor for f in found.values()) < 45


def test_the_command_prints_the_floors(found, capsys):
    assert floors.main([]) == 0
    lines = {line.split()[0]: line.split()[-2:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines == {c: [f"{f.floor:.1f}", f"{f.upper:.1f}"] for c, f in found.items()}
    with pytest.raises(MllmEfficientError, match="usage"):
        floors.main(["train"])


def test_no_form_is_answered_by_one_word(asked):
    """The most frequent answer of each form is as frequent as among equally likely ones, within the bounds of all forms at once."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for category in CATEGORIES:
        for index in range(700):
            for q in make_item("train", index, category).benchmark:
                counts[q.form][q.answer] += 1
    for form, count in counts.items():
        low, _ = proportion(count.most_common(1)[0][1], count.total(), TAIL / sum(len(f.answers) for f in FORMS.values()))
        assert low <= 1 / len(FORMS[form].answers), (form, count)


def bayes(seen):
    """Answers by naive Bayes over the form's name and the words of a question."""
    answers: dict[str, Counter] = defaultdict(Counter)
    words: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for q in seen:
        answers[q.form][q.answer] += 1
        words[q.form, q.answer].update(q.text.split())

    def answer(q):
        def score(candidate):
            own = words[q.form, candidate]
            likely = sum(math.log((own[w] + 1) / (answers[q.form][candidate] + 2)) for w in q.text.split())
            return math.log(answers[q.form][candidate] + 1) + likely

        return max(q.answers, key=score)

    return answer


def test_without_images_nothing_scores_above_the_floor(asked, found):
    """A blind model (one answer for each form) and text-only models (the exact text; its words), all trained on other questions."""
    for category in CATEGORIES:
        seen = [q for index in range(1500) for q in make_item("val", index, category).questions]
        questions = [s.question for s in asked[category]]
        by_form = floors.learnt(seen, lambda q: q.form)
        for answerer in (by_form, floors.learnt(seen, lambda q: q.text, by_form), bayes(seen)):
            assert floors.accuracy(answerer, questions) <= found[category].upper, category


def test_with_other_images_an_oracle_falls_to_the_floor(asked, found):
    """Every question of an item is asked about the pictures of another; what these do not show is guessed."""
    for category in CATEGORIES:
        own, right = asked[category], 0
        for sample in shuffled(own):
            said = oracle.answer(sample.question, sample.shown.pictures)
            right += sample.question.answer == (said if said in sample.question.answers else sample.question.answers[0])
            assert sample.shown != sample.item and sample.shown.category == category
        assert 100 * right / len(own) <= found[category].upper, category
        assert all(oracle.answer(s.question, s.shown.pictures) == s.question.answer for s in own)


def test_shuffled_questions_are_the_same_about_pictures_that_keep_their_names(asked):
    own = samples("val", 60)
    other = shuffled(own)
    assert [(s.id, s.image, s.question) for s in own] == [(s.id, s.image, s.question) for s in other]
    assert {key for s in own for key in s.keys} == {key for s in other for key in s.keys}
    for a, b in zip(own, other):
        (sample,) = {s.item for s in own if s.keys == b.keys}
        assert b.shown == sample and b.sizes() == [p.size for p in b.pictures()] and a.keys != b.keys
        assert not b.region([Plane(2, 3)]).any()
    with pytest.raises(MllmEfficientError, match="chart are about one item"):
        shuffled([s for s in own if s.task == "chart"][:1])


# ---------------------------------------------------------------------------------------------- the suite


def test_a_limit_takes_as_many_of_each_category():
    chosen = samples("val", 36)
    assert Counter(s.task for s in chosen) == dict.fromkeys(CATEGORIES, 6) and chosen == sorted(chosen, key=chosen.index)
    assert {s.id for s in chosen} == {s.id for s in round_robin("val", 36)}
    assert Counter(s.task for s in samples("val", 7, ["chart", "video"])) == {"chart": 4, "video": 3}
    digest = hashlib.sha256(" ".join(s.id for s in samples("test", 600)).encode())
    assert digest.hexdigest() == "836746e9c5d21c1ceb737f5021f282c7350153850c0e633e5b27c6b35e2d055c"
    everything = samples("test", categories=["images"])
    assert len({s.id for s in everything}) == len(everything) == 1000


def test_the_region_of_a_picture_and_of_a_video_are_the_cells_under_their_boxes():
    for sample in samples("val", 60):
        pictures = sample.item.pictures
        if sample.video:  # two frames to a plane, as a tower with a temporal patch of two has them
            planes = [Plane(4, 4, frame=f) for f in range(4)]
            region = sample.region(planes).reshape(4, 4, 4)
            drawn = [[4 * i // 8, boxes] for i, boxes in enumerate(sample.question.regions)]
        else:
            region = np.stack([sample.region([Plane(4, 4)], i).reshape(4, 4) for i in range(len(pictures))])
            drawn = list(enumerate(sample.question.regions))
        wanted, (height, width) = np.zeros_like(region), (PIXEL * pictures[0].height, PIXEL * pictures[0].width)
        for plane, boxes in drawn:
            for box in boxes:
                for row in range(4):
                    for column in range(4):
                        beside = 4 * box.left >= (column + 1) * width or 4 * box.right <= column * width
                        above = 4 * box.top >= (row + 1) * height or 4 * box.bottom <= row * height
                        wanted[plane, row, column] |= not beside and not above
        assert (region == wanted).all(), sample.id


def test_answers_in_a_models_own_words_are_judged():
    for item in items("val", 40):
        for q in item.benchmark:
            assert list(choices(q)) == list(q.answers)
            other = next(a for a in q.answers if a != q.answer)
            for text, right in ((f"It is {q.answer}.", True), (q.answer.upper(), True), (f"{other}, I think", False), ("unsure", False)):
                assert judge(q, text)[1] is right, (q.text, text)


def test_drawn_pictures_are_those_of_the_item():
    sample = next(s for s in samples("val", 12) if s.task == "images")
    assert [p.size for p in sample.pictures()] == sample.sizes()
    assert all((np.asarray(p) == q.draw()).all() for p, q in zip(sample.pictures(), sample.item.pictures))
    assert isinstance(sample, HardSample) and len(sample.keys) == len(sample.item.pictures)
