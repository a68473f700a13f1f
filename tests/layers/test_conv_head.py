"""The classifier head: poolings, resets, widths."""

import pytest
import torch

from coterie.layers import ConvHead


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", "fast"])
@pytest.mark.parametrize("pool_first", [False, True])
def test_every_pooling(pool, pool_first):
    head = ConvHead(6, 5, hidden_size=8, pool_type=pool, pool_first=pool_first).eval()
    x = torch.randn(2, 6, 3, 4)
    assert head(x).shape == (2, 5)
    assert head(x, pre_logits=True).shape == (2, head.num_features)
    torch.testing.assert_close(head.fc(head(x, pre_logits=True)), head(x))


def test_convolution_comes_before_pooling_unless_asked_otherwise():
    torch.manual_seed(0)
    after, first = ConvHead(6, 5, hidden_size=8).eval(), ConvHead(6, 5, hidden_size=8, pool_first=True).eval()
    first.load_state_dict(after.state_dict())
    x = torch.randn(2, 6, 3, 4)
    expected = after.fc(after.pre_logits(x).mean((2, 3)))
    torch.testing.assert_close(after(x), expected)
    torch.testing.assert_close(first(x), first.fc(first.pre_logits(x.mean((2, 3), keepdim=True))[:, :, 0, 0]))
    assert not torch.allclose(after(x), first(x), atol=1e-4)


def test_without_pooling_the_classifier_runs_at_every_position():
    head = ConvHead(6, 5, hidden_size=8, pool_type="").eval()
    x = torch.randn(2, 6, 3, 4)
    assert head(x).shape == (2, 5, 3, 4)
    torch.testing.assert_close(head(x)[:, :, 1, 2], head(x[:, :, 1:2, 2:3])[:, :, 0, 0], atol=1e-6, rtol=1e-5)


def test_reset():
    head = ConvHead(6, 5, hidden_size=8).eval()
    x = torch.randn(2, 6, 3, 4)
    head.reset(3)
    assert head(x).shape == (2, 3)
    head.reset(0)
    assert head(x).shape == (2, 8)
    head.reset(4, "catavgmax")
    assert head(x).shape == (2, 4)
    assert head.num_features == 16
    head.reset(0, "", reset_other=True)
    assert torch.equal(head(x), x)
    head.reset(2, "avg", in_features=9)
    assert head(torch.randn(2, 9, 3, 4)).shape == (2, 2)
    assert not head.fc.training


def test_bad_input():
    with pytest.raises(ValueError, match=r"global_pool must be one of .*got 'mean'"):
        ConvHead(6, 5, pool_type="mean")
    head = ConvHead(6, 5, hidden_size=8, pool_first=True)
    with pytest.raises(ValueError, match="'catavgmax' changes the width"):
        head.reset(5, "catavgmax")
    with pytest.raises(ValueError, match="reset_other=True"):
        head.reset(5, in_features=7)
