"""Annotated pictures: readers of standard formats, transforms, and a loader that is a function of its seed."""

from coterie.data.annotations import IGNORE, Instances
from coterie.data.images import BadSample
from coterie.data.loading import Loader, TooManyBadSamples
from coterie.data.matching import match_classes
from coterie.data.opening import open_data
from coterie.data.pipelines import Pipeline, build_pipeline
from coterie.data.source import DataSource, ImageDataset, Sample
from coterie.data.transforms import TransformConfig, build_transforms

__all__ = [
    "IGNORE",
    "BadSample",
    "DataSource",
    "ImageDataset",
    "Instances",
    "Loader",
    "Pipeline",
    "Sample",
    "TooManyBadSamples",
    "TransformConfig",
    "build_pipeline",
    "build_transforms",
    "match_classes",
    "open_data",
]
