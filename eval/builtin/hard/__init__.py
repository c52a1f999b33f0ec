"""The harder embedded benchmark: documents, charts, crowded scenes, several images, screenshots, video.

``make_item(split, index, category)`` is one prompt: its pictures (``Picture.draw()``) and its questions, each with a one-word answer
and the boxes that it depends on. ``vocabulary()`` lists every word of a question or an answer.
"""

from .forms import CATEGORIES, FORMS, Question, vocabulary
from .items import Item, make_item

__all__ = ["CATEGORIES", "FORMS", "Item", "Question", "make_item", "vocabulary"]
