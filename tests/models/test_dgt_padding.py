"""Padding changes nothing inside an image: not the features, not the gradients, not the statistics, no centroid."""

import pytest
import torch
from small_dgt import images, small_dgt

from coterie.attention import follow_learning_rate

ATTENTION = ["dynamic_group", "global", "shifted_window", "cross_shaped_window"]
PADDINGS = [(0, 0), (1, 0), (0, 3), (9, 23), (40, 7)]
JUNK = 1e3  # what the padding holds; nobody may look at it


def padded(x, rows, columns):
    """The images with junk below and to the right, and the mask."""
    height, width = x.shape[2:]
    canvas = x.new_full((*x.shape[:2], height + rows, width + columns), JUNK)
    canvas[:, :, :height, :width] = x
    mask = torch.zeros(len(x), height + rows, width + columns, dtype=torch.bool)
    mask[:, :height, :width] = True
    return canvas, mask


def inside(maps, like):
    return [x[:, :, : y.shape[2], : y.shape[3]] for x, y in zip(maps, like, strict=True)]


def maps_of(model, x, mask=None):
    return model.forward_intermediates(x, intermediates_only=True, mask=mask)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("post_norm", [False, True])
def test_features_inside_are_the_same_whatever_the_padding(attention, post_norm):
    model = small_dgt(attention=attention, post_norm=post_norm, similarity="cosine" if post_norm else "dot")
    model = model.double().eval()
    x = images(2, 37, 50).double()
    alone = maps_of(model, x)
    for rows, columns in PADDINGS:
        for got, expected in zip(inside(maps_of(model, *padded(x, rows, columns)), alone), alone, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_each_image_of_a_mixed_batch_is_as_alone():
    model = small_dgt().double().eval()
    sizes = [(40, 24), (17, 39), (1, 1), (40, 39)]
    single = [images(1, *size, seed=n).double() for n, size in enumerate(sizes)]
    batch = torch.full((len(sizes), 3, 40, 39), JUNK, dtype=torch.float64)
    mask = torch.zeros(len(sizes), 40, 39, dtype=torch.bool)
    for row, (x, (height, width)) in enumerate(zip(single, sizes, strict=True)):
        batch[row, :, :height, :width] = x[0]
        mask[row, :height, :width] = True
    together = maps_of(model, batch, mask)
    for row, x in enumerate(single):
        alone = maps_of(model, x)
        for got, expected in zip(inside([y[row : row + 1] for y in together], alone), alone, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_training_step_is_the_same():
    steps = []
    for rows, columns in [(0, 0), (5, 30)]:
        model = small_dgt().double().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        follow_learning_rate(model, optimizer)
        x = images(3, 37, 50).double()
        canvas, mask = padded(x, rows, columns)
        canvas.requires_grad_()
        maps = maps_of(model, canvas, mask if rows else None)
        kept = [y[:, :, : -(-37 // s), : -(-50 // s)] for y, s in zip(maps, (2, 4, 8, 16), strict=True)]
        sum(y.square().mean() for y in kept).backward()
        assert rows == 0 or not canvas.grad[:, :, 37:].any()
        assert rows == 0 or not canvas.grad[:, :, :, 50:].any()
        before = [b.clone() for n, b in model.named_buffers() if n.endswith("centroids")]
        optimizer.step()
        after = [b for n, b in model.named_buffers() if n.endswith("centroids")]
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        steps.append(dict(model.state_dict()))
    assert any("running_mean" in name for name in steps[0])
    for name, value in steps[0].items():
        torch.testing.assert_close(steps[1][name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_a_mask_that_masks_nothing_changes_nothing():
    model = small_dgt().eval()
    x = images(2, 40, 24)
    mask = torch.ones(2, 40, 24, dtype=torch.bool)
    with torch.no_grad():  # with a mask the fused feed-forward of inference is not used
        for got, expected in zip(maps_of(model, x, mask), maps_of(model, x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.forward_features(x, mask), model.forward_features(x), rtol=1e-3, atol=1e-4)


def test_forward_features_takes_the_mask():
    model = small_dgt().double().eval()
    x = images(1, 33, 20).double()
    expected = model.forward_features(x)
    torch.testing.assert_close(inside([model.forward_features(*padded(x, 8, 40))], [expected])[0], expected)


def test_checkpointing_with_a_mask_gives_the_same_gradients():
    grads = []
    for frugal in (False, True):
        model = small_dgt().train()
        model.set_grad_checkpointing(frugal)
        canvas, mask = padded(images(2, 20, 20), 4, 12)
        model.forward_features(canvas, mask)[:, :, :2, :2].square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_an_image_that_is_all_padding_gives_finite_features():
    model = small_dgt().eval()
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0] = True
    assert all(y.isfinite().all() for y in maps_of(model, images(2), mask))


def test_masks_that_do_not_fit():
    model = small_dgt().eval()
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        maps_of(model, images(), torch.ones(2, 32, 32))
    with pytest.raises(ValueError, match=r"mask must have shape \(batch, height, width\) = \(2, 32, 32\)"):
        maps_of(model, images(), torch.ones(2, 16, 16, dtype=torch.bool))
