"""Pictures with labels: readers of standard formats, transforms, and a loader that is a function of its seed."""

from coterie.data.images import BadSample
from coterie.data.loading import Loader, TooManyBadSamples
from coterie.data.opening import open_data
from coterie.data.source import DataSource, ImageDataset, Sample
from coterie.data.transforms import TransformConfig, build_transforms

__all__ = [
    "BadSample",
    "DataSource",
    "ImageDataset",
    "Loader",
    "Sample",
    "TooManyBadSamples",
    "TransformConfig",
    "build_transforms",
    "open_data",
]
