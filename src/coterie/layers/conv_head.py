"""A classifier head with a 1x1 convolution before the pooling, as in CMT: conv -> BN -> SiLU -> pool -> linear."""

from jaxtyping import Float
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

_POOLS = ("", "avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")


class ConvHead(nn.Module):
    """Widen the features, pool them, classify.

    Args:
        in_features: channels of the feature map.
        num_classes: classes; 0 leaves the classifier out, so that the output are the pooled features.
        hidden_size: channels after the 1x1 convolution; 0 leaves convolution, BN and SiLU out.
        pool_type: timm's global pooling: "avg", "max", "avgmax", "catavgmax", or "" for none.
        pool_first: pool before the 1x1 convolution instead of after it (another function with the same parameters).
        drop_rate: dropout before the classifier.

    `num_features` is the number of features that the classifier sees.

    Shape: (batch, in_features, rows, columns) -> (batch, num_classes), or without pooling
        (batch, num_classes, rows, columns).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        hidden_size: int = 1280,
        pool_type: str = "avg",
        pool_first: bool = False,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_features = in_features
        self.hidden_size = hidden_size
        self.pool_first = pool_first
        self.global_pool = _pool(pool_type)
        pooled = self.global_pool.feat_mult() if pool_first else 1
        self.pre_logits: nn.Module = nn.Identity()
        if hidden_size:
            self.pre_logits = nn.Sequential(
                nn.Conv2d(in_features * pooled, hidden_size, 1, **dd), nn.BatchNorm2d(hidden_size, **dd), nn.SiLU()
            )
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Identity()
        self._set_classifier(num_classes, **dd)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        *,
        reset_other: bool = False,
        in_features: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        """Replace the classifier, and optionally the pooling.

        Args:
            num_classes: classes of the new classifier, 0 to remove it.
            pool_type: new global pooling, unchanged if None.
            reset_other: remove convolution, BN and SiLU too.
            in_features: new number of input features (after pruning; needs `reset_other`).
            device, dtype: of the new classifier.
        """
        if reset_other:
            self.pre_logits = nn.Identity()
            self.hidden_size = 0
        if in_features is not None and in_features != self.in_features:
            if self.hidden_size:
                raise ValueError(
                    f"in_features can only change from {self.in_features} to {in_features} with reset_other=True"
                )
            self.in_features = in_features
        if pool_type is not None:
            pool = _pool(pool_type)
            if self.hidden_size and self.pool_first and pool.feat_mult() != self.global_pool.feat_mult():
                raise ValueError(
                    f"pool_type {pool_type!r} changes the width of the pooled features, which a head that pools first "
                    f"has been built for; got {self.global_pool.pool_type!r} before"
                )
            self.global_pool = pool
        self._set_classifier(num_classes, device=device, dtype=dtype)
        self.train(self.training)

    def _set_classifier(self, num_classes: int, device=None, dtype=None) -> None:
        width = self.hidden_size or self.in_features
        if not (self.hidden_size and self.pool_first):
            width *= self.global_pool.feat_mult()
        self.num_features = width
        self.fc = nn.Linear(width, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch in_features height width"], pre_logits: bool = False
    ) -> Float[Tensor, "batch ..."]:
        """Logits; with `pre_logits` what the classifier would get."""
        if self.pool_first:
            x = self.pre_logits(self.global_pool(x))
        else:
            x = self.global_pool(self.pre_logits(x))
        pooled = not self.global_pool.is_identity()
        if pooled:
            x = x.flatten(1)
        x = self.drop(x)
        if pre_logits:
            return x
        return self.fc(x) if pooled else self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _pool(pool_type: str) -> SelectAdaptivePool2d:
    if pool_type not in _POOLS:
        raise ValueError(f"global_pool must be one of {', '.join(map(repr, _POOLS))}, got {pool_type!r}")
    return SelectAdaptivePool2d(pool_type=pool_type, flatten=False)
