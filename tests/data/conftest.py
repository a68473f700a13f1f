"""Pictures made on the spot, and where the real sample data lie."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; the test is skipped where there is none."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("COTERIE_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip("no sample data: set COTERIE_SHARED_DATA to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """A noise picture: picture(seed, size=(width, height), mode="RGB")."""

    def make(seed: int = 0, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Image.Image:
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        return Image.fromarray(noise).convert(mode)

    return make


@pytest.fixture(scope="session")
def encoded(picture: Callable[..., Image.Image]) -> Callable[..., bytes]:
    """The bytes of a noise picture: encoded("PNG", seed, size=..., mode=...)."""

    def make(kind: str = "PNG", seed: int = 0, **options: object) -> bytes:
        buffer = io.BytesIO()
        picture(seed, **options).save(buffer, kind)
        return buffer.getvalue()

    return make


@pytest.fixture
def image_folder(tmp_path: Path, encoded: Callable[..., bytes]) -> Callable[[dict[str, int]], Path]:
    """A folder of PNG pictures: image_folder({"train/cat": 3, "train/dog": 2}) gives its path."""

    def make(counts: dict[str, int], name: str = "pictures") -> Path:
        root = tmp_path / name
        for number, (place, count) in enumerate(counts.items()):
            (root / place).mkdir(parents=True)
            for index in range(count):
                (root / place / f"{index:03}.png").write_bytes(encoded("PNG", 1000 * number + index))
        return root

    return make


@pytest.fixture
def coco_folder(tmp_path: Path, encoded: Callable[..., bytes]) -> Callable[..., Path]:
    """A COCO set of 20x16 pictures beside their json: coco_folder(train=[...], val=[...]).

    Each split is a list with the annotations of each picture: mappings without id and image_id. Further keywords
    replace parts of the documents.
    """

    def make(categories: dict[int, str] | None = None, change: Callable | None = None, **splits: list) -> Path:
        root = tmp_path / "coco"
        (root / "images").mkdir(parents=True)
        names = {3: "cat", 7: "dog"} if categories is None else categories
        for split, pictures in splits.items():
            document: dict = {
                "images": [],
                "annotations": [],
                "categories": [{"id": key, "name": name} for key, name in names.items()],
            }
            for number, objects in enumerate(pictures):
                file = f"{split}{number}.png"
                (root / "images" / file).write_bytes(encoded("PNG", number))
                document["images"].append({"id": 100 + number, "file_name": file, "width": 20, "height": 16})
                for annotation in objects:
                    place = len(document["annotations"])
                    document["annotations"].append({"id": place, "image_id": 100 + number, **annotation})
            if change is not None:
                change(split, document)
            (root / f"instances_{split}.json").write_text(json.dumps(document))
        return root

    return make
