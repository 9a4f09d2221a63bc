"""Features of a frozen encoder, computed once and read again in every epoch: training a decoder takes minutes."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from segm import parallel
from segm.data import SegmentationDataset
from segm.interruption import Interruption, SignalError
from segm.model.segmenter import Segmenter

FOLDER = "features"
BATCH = 4

Autocast = Callable[[], AbstractContextManager[Any]]


class CachedFeatures(Dataset):
    """The training items of a data set with the encoder's patch tokens in place of the images.

    `cached[(epoch, index)]` is the item of epoch `epoch % n_versions`: so many augmented versions of each image are
    seen again and again. Features are kept on disk in half precision.

    Args:
        dataset: the images.
        folder: where the features are kept.
        n_versions: of each image.
    """

    def __init__(self, dataset: SegmentationDataset, folder: Path, n_versions: int) -> None:
        self.dataset, self.root, self.folder, self.n_versions = dataset, folder, folder, n_versions
        self._opened: dict[Path, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def name_of(self, index: int) -> str:
        """What a message calls the image at `index`."""
        return self.dataset.name_of(index)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Tensor]:
        """`image`: patch tokens (N, D), float32; `label`: int64 (h, w)."""
        epoch, index = item
        features, labels = (self._open(self._file(epoch % self.n_versions, kind)) for kind in ("tokens", "labels"))
        tokens = torch.from_numpy(features[index].astype(np.float32))
        return {"image": tokens, "label": torch.from_numpy(labels[index].astype(np.int64))}

    def _file(self, version: int, kind: str) -> Path:
        return self.folder / f"{kind}_{version}.npy"

    def _open(self, file: Path) -> np.ndarray:
        if file not in self._opened:
            self._opened[file] = np.load(file, mmap_mode="r")
        return self._opened[file]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}  # a worker opens the files itself

    def fill(
        self, model: Segmenter, device: torch.device, autocast: Autocast, interruption: Interruption | None = None
    ) -> None:
        """Compute the versions that are not there yet, shared between the processes.

        Args:
            model: a Segmenter on `device`; its encoder is put into evaluation mode.
            device: where to compute.
            autocast: context of the forward pass.
            interruption: asks for an end; whole versions are kept.

        Raises:
            ValueError: they do not fit on the disk.
            SignalError: a signal.
        """
        model.encoder.eval()
        self.folder = self.root / self._fingerprint(model)
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [version for version in range(self.n_versions) if not self._file(version, "tokens").exists()]
        mine = missing[parallel.rank() :: parallel.world_size()]
        self._check_space(model, len(missing))
        total = len(mine) * len(self)
        with tqdm(total=total, desc="features", unit="image", leave=False, disable=not parallel.is_main()) as bar:
            for version in mine:
                for _ in self._fill_version(version, model, device, autocast):
                    bar.update()
                    if interruption is not None and interruption.status:
                        message = f"ended by a signal while {self.folder} was filled: start it again to go on"
                        raise SignalError(message, interruption.status)
        parallel.all_reduce_sum(torch.zeros(1, device=device))  # all wait for all

    @torch.inference_mode()
    def _fill_version(self, version: int, model: Segmenter, device: torch.device, autocast: Autocast) -> Iterator[int]:
        """Compute one version; yields the index of every image that is done."""
        parts = {kind: self._file(version, kind).with_suffix(".part") for kind in ("tokens", "labels")}
        items = [(version, index) for index in range(len(self))]
        opened: dict[str, np.memmap] = {}
        first = 0
        for batch in DataLoader(self.dataset, batch_size=BATCH, sampler=items):
            with autocast():
                tokens = model.encode(batch["image"].to(device))
            found = {"tokens": tokens.half().cpu().numpy(), "labels": batch["label"].numpy().astype(np.uint8)}
            for kind, values in found.items():
                if kind not in opened:
                    shape = (len(self), *values.shape[1:])
                    opened[kind] = np.lib.format.open_memmap(parts[kind], "w+", values.dtype, shape)
                opened[kind][first : first + len(values)] = values
            yield from range(first, first + len(tokens))
            first += len(tokens)
        for kind in ("labels", "tokens"):  # the tokens last: where they are, all is
            opened[kind].flush()
            parts[kind].rename(self._file(version, kind))

    def _fingerprint(self, model: Segmenter) -> str:
        """Of all that features depend on, so that those of another training are not taken for these."""
        names = ("name", "image_size", "crop_size", "resize_factor", "normalization", "seed", "ratios")
        seen = [len(self), *(getattr(self.dataset, name) for name in names)]
        digest = hashlib.sha256(repr(seen).encode())
        for name, values in model.encoder.state_dict().items():
            digest.update(name.encode())
            digest.update(values.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _check_space(self, model: Segmenter, n_versions: int) -> None:
        height, width = self.dataset.crop_size
        ph, pw = model.patch_size
        n_patches = -(-height // ph) * -(-width // pw)
        needed = n_versions * len(self) * (2 * n_patches * model.encoder.embed_dim + height * width)
        free = shutil.disk_usage(self.folder).free
        if needed > 0.95 * free:
            raise ValueError(
                f"--cache-features {self.n_versions}: takes {needed / 2**30:.1f} GiB in {self.folder}, "
                f"{free / 2**30:.1f} GiB are free: give a smaller number"
            )

    def remove(self) -> None:
        """Forget the features."""
        self._opened.clear()
        if parallel.is_main():
            shutil.rmtree(self.root, ignore_errors=True)


class Head(nn.Module):
    """The part of a Segmenter behind its encoder.

    Args:
        model: the Segmenter, whose parameters it shares.
        size: (height, width) of the images, pixels.
    """

    def __init__(self, model: Segmenter, size: tuple[int, int]) -> None:
        super().__init__()
        self.decoder = model.decoder
        self._decode, self.size = model.decode, size

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, N, D) patch tokens of the encoder -> logits (B, n_cls, H, W)."""
        return self._decode(tokens, self.size)
