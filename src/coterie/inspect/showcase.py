"""Pictures of dense predictions beside the truth: what was there, and what the network said.

Pictures are drawn at about the size at which they are shown, so that lines and legends are readable. What cannot be
shown (no data, no network, a picture that cannot be read) leaves its reason in the place of the picture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from coterie.data import BadSample, Instances
from coterie.engine.answers import fit
from coterie.inspect import page
from coterie.inspect.page import text
from coterie.inspect.tiles import data_uri

logger = logging.getLogger("coterie.inspect")

SIDE = 320
"""Longest side of an embedded picture, in pixels: about as large as it is shown, so that its legend can be read."""

Answer = dict[str, Any]


class Showcase:
    """Draws test images with their truth and with an answer.

    Args:
        task: Draws answers.
        source: The data, or None.
        answer_of: The network's answer for an image of the test split, by its number and its picture.
    """

    def __init__(self, task: Any, source: Any | None, answer_of: Callable[[int, Image.Image], Answer]) -> None:
        self.task, self.source, self.answer_of = task, source, answer_of

    def example(self, index: int, title: str, remark: str) -> str:
        """A card with the truth and the answer side by side; title and remark are plain text."""
        body = f'<div class="title">{text(title)}</div><div class="muted">{text(remark)}</div>'
        pictures = ""
        try:
            name, image, truth = self._sample(index)
            for what, answer in (("truth", truth), ("answer", self.answer_of(index, image))):
                pictures += page.picture(self._drawn(image, answer), f"{name}: {what}", what)
        except (LookupError, OSError, ValueError, BadSample) as error:
            logger.warning("report: test image %d cannot be shown: %s", index, error)
            pictures = f'<div class="none">no picture: {text(" ".join(str(error).split()))}</div>'
        return f'<div class="example"><div class="body">{body}</div><div class="duo">{pictures}</div></div>'

    def gallery(self, heading: str, examples: Sequence[tuple[int, str, str]], lede: str = "") -> str:
        """Examples (index, title, remark) under a heading; nothing where there are none."""
        if not examples:
            return ""
        shown = "".join(self.example(*entry) for entry in examples)
        said = page.lede(text(lede)) if lede else ""
        return f'<div><h3>{text(heading)}</h3>{said}<div class="duos">{shown}</div></div>'

    def _sample(self, index: int) -> tuple[str, Image.Image, Answer]:
        if self.source is None:
            raise ValueError("the data is not at hand")
        sample = self.source.splits["test"][index]
        return sample.name, sample.image, as_answer(sample.label, masks=self.task.masks)

    def _drawn(self, image: Image.Image, answer: Answer) -> str:
        return data_uri(self.task.draw(*fit(image, answer, most=SIDE)))


def as_answer(target: Instances | np.ndarray, *, masks: bool = True) -> Answer:
    """What is known of an image in the form of an answer. Instances have no scores, crowds are left out.

    Without `masks` those of the data are left out, as a detector of boxes knows nothing of them.
    """
    if not isinstance(target, Instances):
        return {"label_map": np.asarray(target)}
    target = target[~target.crowd]
    answer: Answer = {"boxes": target.boxes, "labels": target.labels}
    if masks and target.segmentations is not None:
        answer["masks"] = target.decode().astype(bool)
    return answer
