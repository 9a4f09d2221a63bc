"""Data sets for semantic segmentation. Importing this package imports neither mmcv nor mmseg."""

from segm.data.dataset import IGNORE_LABEL, Photographs, Sample, SegmentationDataset, fingerprint, spread
from segm.data.factory import DATASETS, class_info, create_dataset, dataset_defaults
from segm.data.images import NORMALIZATION, normalize

__all__ = [
    "DATASETS",
    "IGNORE_LABEL",
    "NORMALIZATION",
    "Photographs",
    "Sample",
    "SegmentationDataset",
    "class_info",
    "create_dataset",
    "dataset_defaults",
    "fingerprint",
    "normalize",
    "spread",
]
