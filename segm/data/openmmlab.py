"""The one place that imports mmcv and mmseg, so that their import stays silent.

`mmseg` prints two lines about OneDL and warns about compiled operators that nothing here needs. The classes
are used directly, not by name, so nothing has to be registered and no global scope is set.
"""

import contextlib
import io
import warnings

from segm.errors import TRAINING

try:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mmseg.datasets as mmseg_datasets
        from mmcv.transforms import Normalize, Pad, RandomResize
        from mmseg.datasets import BaseSegDataset
        from mmseg.datasets.transforms import LoadAnnotations, PhotoMetricDistortion, RandomCrop
        from mmseg.datasets.transforms.transforms import RandomFlip, Resize
except ModuleNotFoundError as error:
    raise ValueError(f"labelled data sets are read by mmsegmentation, which is not installed: {TRAINING}") from error

__all__ = [
    "BaseSegDataset",
    "LoadAnnotations",
    "Normalize",
    "Pad",
    "PhotoMetricDistortion",
    "RandomCrop",
    "RandomFlip",
    "RandomResize",
    "Resize",
    "mmseg_datasets",
]
