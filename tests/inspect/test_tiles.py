"""The pictures show members in blue, keys in orange, and decode."""

import base64
import io

import numpy as np
import pytest
import torch
from inspect_networks import StripeNet
from PIL import Image

from coterie.inspect import inspect_groups
from coterie.inspect.figures import block_figure, sizes_figure
from coterie.inspect.groups import by_block
from coterie.inspect.tiles import (
    KEY,
    cell_of_pixel,
    data_uri,
    draw_all_groups,
    draw_group,
    enlarge,
    group_colours,
    to_picture,
)


@pytest.fixture(scope="module")
def found() -> list:
    return inspect_groups(StripeNet(top_k=1), torch.zeros(3, 32, 64))


def test_members_are_blue_and_the_rest_is_pale(found: list) -> None:
    picture = np.full((32, 64, 3), 128, dtype=np.uint8)
    tile = draw_group(picture, found[0], group=1, side=256).astype(int)
    assert tile.shape == (128, 256, 3)
    member, other = tile[16 + 8, 100], tile[40 + 8, 100]  # row 1 of 8 is in group 1, row 2 is not
    assert member[2] > member[0] + 60
    assert np.ptp(other) <= 2
    assert other.mean() > 160


def test_the_key_is_marked_in_its_cell(found: list) -> None:
    picture = np.full((32, 64, 3), 128, dtype=np.uint8)
    tile = draw_group(picture, found[0], group=2, side=256)
    assert np.abs(tile[8, 8].astype(int) - KEY).max() < 8  # the centre of cell 0, 16 pixels wide
    assert np.abs(tile[8, 8 + 16].astype(int) - KEY).max() > 60


def test_all_groups_have_their_own_colour(found: list) -> None:
    tile = draw_all_groups(np.full((32, 64, 3), 200, dtype=np.uint8), found[0], side=256)
    rows = {tuple(tile[16 * row + 8, 100]) for row in range(8)}
    assert len(rows) == 4
    assert len({tuple(c) for c in group_colours(48).tolist()}) == 48


@pytest.mark.parametrize("grid", [(3, 5), (7, 2), (1, 1)])
def test_every_cell_has_pixels(grid: tuple[int, int]) -> None:
    cells = cell_of_pixel(grid, 20, 30)
    assert np.array_equal(np.unique(cells), np.arange(grid[0] * grid[1]))


def test_normalisation_is_undone() -> None:
    image = torch.rand(3, 4, 6)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    normal = (image - mean[:, None, None]) / std[:, None, None]
    picture = to_picture(normal, tuple(mean.tolist()), tuple(std.tolist()))
    assert np.abs(picture / 255 - image.permute(1, 2, 0).numpy()).max() < 0.003
    grey = to_picture(torch.zeros(1, 4, 6), (0.5,), (0.5,))
    assert grey.shape == (4, 6, 3)
    assert (grey == 128).all()


def test_enlarge_keeps_proportions() -> None:
    assert enlarge(np.zeros((8, 8, 3), np.uint8), 224).shape == (224, 224, 3)
    assert enlarge(np.zeros((300, 600, 3), np.uint8), 224).shape == (112, 224, 3)
    assert enlarge(np.zeros((1, 500, 3), np.uint8), 224).shape == (1, 224, 3)


@pytest.mark.parametrize("size", [(8, 8), (300, 200)])
def test_data_addresses_decode(size: tuple[int, int]) -> None:
    uri = data_uri(np.zeros((*size, 3), np.uint8))
    kind, _, payload = uri.partition(";base64,")
    assert kind.startswith("data:image/")
    assert Image.open(io.BytesIO(base64.b64decode(payload))).size == size[::-1]


def test_figures_can_be_saved(found: list) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    heads = by_block(found)[0]
    sheet = block_figure(picture, heads, groups=2, title="a title")
    assert len(sheet.axes[0].images) == len(heads) * (1 + 2)  # all groups at once, and two of them
    captions = [text.get_text() for text in sheet.axes[0].texts]
    assert captions.count("all groups") == len(heads)
    assert captions.count("tokens per group, largest first · 0 empty") == len(heads)
    for figure in (sheet, sizes_figure(found)):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        assert Image.open(buffer).size[0] > 300
    with pytest.raises(ValueError, match="heads: got none"):
        block_figure(picture, [])
    with pytest.raises(ValueError, match="found: got no groups"):
        sizes_figure([])
