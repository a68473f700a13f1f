"""Deformable patches: a linear layer over them is torchvision's deformable convolution, value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d

from coterie.ops.deformable import deformable_patches


def convolved(x, offset, weight, size):
    """The deformable convolution by patches: maps in, map out."""
    patches = deformable_patches(x.permute(0, 2, 3, 1), offset.permute(0, 2, 3, 1), size)
    return F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("height", "width", "size"), [(6, 8, 2), (7, 5, 2), (9, 7, 3), (1, 1, 1)])
@pytest.mark.parametrize("far", [0.4, 3.0, 40.0])
def test_it_equals_torchvisions_deformable_convolution(height, width, size, far):
    generator = torch.Generator().manual_seed(height)
    x = torch.randn(2, 5, height, width, dtype=torch.float64, generator=generator)
    offset = torch.randn(2, 2 * size**2, height // size, width // size, dtype=torch.float64, generator=generator)
    weight = torch.randn(6, 5, size, size, dtype=torch.float64, generator=generator)
    leaves = [t.requires_grad_() for t in (x, offset, weight)]
    ours = convolved(x, far * offset, weight, size)
    theirs = deform_conv2d(x, far * offset, weight, stride=size)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for one, other in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad)):
        torch.testing.assert_close(one, other)


def test_without_offsets_they_are_the_patches_and_beyond_the_border_there_are_zeros():
    x = torch.randn(2, 3, 5, 4)
    patches = deformable_patches(x, torch.zeros(2, 2, 3, 8), 2)
    filled = F.pad(x, (0, 0, 0, 1, 0, 1))
    expected = filled.unfold(1, 2, 2).unfold(2, 2, 2).permute(0, 1, 2, 4, 5, 3).flatten(3)
    assert torch.equal(patches, expected)
    for far in (-1e9, 1e9):
        assert deformable_patches(x, torch.full((2, 2, 3, 8), far), 2).abs().max() == 0


def test_half_precision_knows_its_place_in_a_large_map():
    x = torch.arange(600.0).reshape(1, 1, 600, 1) / 600
    offset = torch.full((1, 1, 300, 8), 0.25)
    exact = deformable_patches(x, offset, 2)
    half = deformable_patches(x.bfloat16(), offset.bfloat16(), 2)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.01)


def test_compiled_and_exported_it_is_the_same():
    x, offset = torch.randn(1, 5, 7, 4), torch.randn(1, 3, 4, 8)
    expected = deformable_patches(x, offset, 2)
    torch._dynamo.reset()
    compiled = torch.compile(deformable_patches, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, offset, 2), expected)

    class Patches(torch.nn.Module):
        def forward(self, x, offset):
            return deformable_patches(x, offset, 2)

    program = torch.export.export(Patches(), (x, offset))
    assert "embedding_bag" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x, offset), expected)


def test_bad_arguments():
    x, offset = torch.randn(2, 4, 4, 3), torch.zeros(2, 2, 2, 8)
    for args, error, text in [
        ((x[0], offset, 2), ValueError, r"x must have shape \(batch, height, width, dim\)"),
        ((x, offset[..., :6], 2), ValueError, "must agree in number of offsets, got 8 and 6"),
        ((x, offset[:1], 2), ValueError, "x and offset must agree in batch, got 2 and 1"),
        ((x, offset, 0), ValueError, "size must be at least 1, got 0"),
        ((x.long(), offset, 2), TypeError, "x must be float64, float32"),
    ]:
        with pytest.raises(error, match=text):
            deformable_patches(*args)
