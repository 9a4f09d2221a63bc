"""The data sets' names and their published settings (`configs/datasets.yml`)."""

from segm.config import load_config

DATASETS: tuple[str, ...] = tuple(load_config("datasets"))


def dataset_defaults(name: str) -> dict:
    """Settings of one data set: `n_cls epochs eval_freq batch_size learning_rate im_size crop_size
    window_size window_stride resize_factor`. `n_cls` is None for `folder`.

    Raises:
        ValueError: no data set has this name.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; allowed: {', '.join(DATASETS)}")
    return load_config("datasets")[name]
