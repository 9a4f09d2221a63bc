"""Data sets for semantic segmentation. Importing this package imports neither mmcv nor mmseg."""

from segm.data.dataset import SegmentationDataset
from segm.data.defaults import DATASETS, dataset_defaults
from segm.data.factory import class_info, create_dataset
from segm.data.normalization import NORMALIZATION, normalize
from segm.data.sample import IGNORE_LABEL, Sample

__all__ = [
    "DATASETS",
    "IGNORE_LABEL",
    "NORMALIZATION",
    "Sample",
    "SegmentationDataset",
    "class_info",
    "create_dataset",
    "dataset_defaults",
    "normalize",
]
