"""Sets of pictures with label maps or instances, and the rules about annotations that are wrong.

Readers (coco.py, voc.py, maps.py, dense_parquet.py) find pictures and annotations; what is right is decided here, once
for all of them:

    an object whose box is no box, has no area or lies outside the picture,
    whose category is unknown, or whose mask is damaged or of another size   skipped, reported, counted
    an annotation without a picture                                          skipped, reported, counted
    a box that reaches over the edge                                         clipped; reported from one pixel on
    a picture that cannot be read, or is not of the size its annotation says
    a label map of another size than its picture, or with a label that is
    no class                                                                 a bad sample: see loading.py

More than a share of skipped annotations (`max_bad_share`, but one at least) and the set does not open.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from coterie.data.annotations import IGNORE
from coterie.data.images import BadSample
from coterie.data.randomness import permutation
from coterie.data.source import HOLDOUT_SHARE, DataSource, ImageDataset, Subset, sample_headers, stratified_split

logger = logging.getLogger("coterie.data")

MAX_BAD_SHARE = 0.01
_REPORTED = 20


class Problems:
    """Annotations that were skipped or mended, reported as they are found."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.skipped: list[str] = []
        self.mended = 0

    def skip(self, name: str, reason: str) -> None:
        """Count an annotation that is left out, and say so."""
        self.skipped.append(f"{name}: {reason}")
        self._report("skipped", len(self.skipped), self.skipped[-1])

    def mend(self, name: str, reason: str) -> None:
        """Count an annotation that is used after a correction, and say so."""
        self.mended += 1
        self._report("mended", self.mended, f"{name}: {reason}")

    def check(self, total: int, max_bad_share: float) -> None:
        """Raise ValueError when more of `total` annotations were skipped than the share allows (one always may)."""
        allowed = max(int(max_bad_share * total + 1e-9), 1) if max_bad_share else 0
        if len(self.skipped) > allowed:
            shown = "; ".join(self.skipped[:3]) + ("; ..." if len(self.skipped) > 3 else "")
            raise ValueError(
                f"{self.where}: {len(self.skipped)} of {total} annotations cannot be used, more than the share of "
                f"{max_bad_share:g} that max_bad_share allows: {shown}"
            )

    def _report(self, what: str, count: int, line: str) -> None:
        if count <= _REPORTED:
            logger.warning("%s %s", what, line)
        elif count == _REPORTED + 1:
            logger.warning("%s: more annotations were %s; from now on they are only counted", self.where, what)


def read_checked(dataset: ImageDataset, index: int) -> bytes:
    """The bytes of a picture. Raises BadSample where there are none."""
    try:
        return dataset.read(index)
    except OSError as error:
        raise BadSample(dataset.name(index), error.strerror or str(error)) from error


def assemble_dense(
    name: str,
    classes: Sequence[str],
    splits: Mapping[str, ImageDataset],
) -> DataSource:
    """Make a DataSource of what a reader found: hold out a tenth where there is no test split, measure sizes.

    Training pictures without any object (crowds aside) are left out, as the usual recipes do; evaluation keeps them.

    Raises:
        ValueError: no training pictures, none with an object, no class, too many classes, none can be read.
    """
    splits = {key: split for key, split in splits.items() if len(split)}
    if "train" not in splits:
        raise ValueError(f"{name}: no training images")
    target = splits["train"].kind
    if not classes or (target == "label_map" and len(classes) >= IGNORE):
        raise ValueError(f"{name}: {len(classes)} classes, takes 1 to {IGNORE - 1}")
    for key in [key for key in splits if key != "train" and _all_ignored(splits[key])]:
        logger.warning("%s: the %s split has no labels and is left out", name, key)
        del splits[key]
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if "test" not in splits:
        kept, held_out = stratified_split(splits["train"].labels, HOLDOUT_SHARE)
        if not len(held_out):
            raise ValueError(f"{name}: {len(kept)} images and no test split: too few to hold any out")
        splits["train"], splits["test"] = Subset(splits["train"], kept), Subset(splits["train"], held_out)
    if target == "instances":
        splits["train"] = _with_objects(name, splits["train"])
    headers = sample_headers(name, splits["train"])
    for split in splits.values():
        split.channels = 3  # detectors and decoders are made for colour; grey pictures repeat their channel
    return DataSource(
        name=name,
        classes=list(classes),
        channels=3,
        native_size=(
            int(np.median([header.height for header in headers])),
            int(np.median([header.width for header in headers])),
        ),
        splits={key: splits[key] for key in ("train", "validation", "test") if key in splits},
        # Objects called by single characters or numbers are taken for letters and digits; the classes of label maps
        # are called by numbers where nothing names them.
        mirror=target == "label_map" or not all(len(label) == 1 or label.isdecimal() for label in classes),
        target=target,
        has_masks=all(split.has_masks for split in splits.values()),
    )


def _all_ignored(split: ImageDataset) -> bool:
    """Whether label maps say nothing, as is the custom for withheld ones (the test split of Cityscapes)."""
    if split.kind != "label_map":
        return False
    for index in permutation(len(split), 0)[:4].tolist():
        try:
            if (split.target(index) != IGNORE).any():
                return False
        except BadSample:
            return False  # the Loader reports it when its turn comes
    return True


def _with_objects(name: str, train: ImageDataset) -> ImageDataset:
    useful = np.array([not train.target(index).crowd.all() for index in range(len(train))])
    if useful.all():
        return train
    if not useful.any():
        raise ValueError(f"{name}: no training image has an object")
    logger.info("%s: %d of %d training images show no object: left out", name, (~useful).sum(), len(useful))
    return Subset(train, np.flatnonzero(useful))
