"""Features of a frozen encoder, computed once and read again in every epoch: training a decoder takes minutes."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from segm import parallel
from segm.data import IGNORE_LABEL, SegmentationDataset, fingerprint
from segm.model.segmenter import Segmenter
from segm.parallel import Interruption, SignalError
from segm.storage import atomic

FOLDER = "features"
PART, BATCH = 64, 4  # images per file, which processes share and interruptions keep; images per forward pass
POLL = 0.5  # seconds between two looks for the files of other processes

Autocast = Callable[[], AbstractContextManager[Any]]
Part = tuple[int, int]  # version, number of the part


class CachedFeatures(Dataset):
    """The training items of a data set with the encoder's patch tokens in place of the images.

    `cached[(epoch, index)]` is the item of epoch `epoch % n_versions`: so many augmented versions of each image are
    seen again and again. Features are kept on disk in half precision, in one folder per fingerprint: trainings that
    would see other images, labels, weights or another precision never read them.

    Args:
        dataset: the images.
        folder: place of the features.
        n_versions: of each image.
    """

    def __init__(self, dataset: SegmentationDataset, folder: Path, n_versions: int) -> None:
        self.dataset, self.root, self.folder, self.n_versions = dataset, folder, folder, n_versions

    def __len__(self) -> int:
        return len(self.dataset)

    def name_of(self, index: int) -> str:
        """The name of the image at `index` in messages."""
        return self.dataset.name_of(index)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Tensor]:
        """`image`: patch tokens (N, D), float32; `label`: int64 (h, w)."""
        epoch, index = item
        number, row = divmod(index, PART)
        with safe_open(self._file((epoch % self.n_versions, number)), "pt") as opened:
            tokens, label = (opened.get_slice(name)[row] for name in ("tokens", "labels"))
        return {"image": tokens.float(), "label": label.long()}

    def _file(self, part: Part) -> Path:
        return self.folder / "{}_{}.safetensors".format(*part)

    def _images(self, part: Part) -> range:
        first = part[1] * PART
        return range(first, min(first + PART, len(self)))

    def fill(
        self,
        model: Segmenter,
        device: torch.device,
        autocast: Autocast,
        interruption: Interruption | None = None,
        workers: int = 0,
    ) -> None:
        """Compute the features that are not there yet, shared between the processes.

        Processes wait for each other's files and not in a collective, which would time out.

        Args:
            model: a Segmenter on `device`; its encoder is put into evaluation mode.
            autocast: context of the forward pass.
            interruption: asks for an end; whole parts are kept.
            workers: processes that read images.

        Raises:
            ValueError: they do not fit on the disk, or the processes share no disk.
            SignalError: a signal.
        """
        model.encoder.eval()
        self._open_folder(fingerprint(self.dataset, *_conditions(model, device, autocast)))
        parts = [(version, n) for version in range(self.n_versions) for n in range(-(-len(self) // PART))]
        missing = {part for part in parts if not self._file(part).exists()}
        self._check_space(model, sum(len(self._images(part)) for part in missing))
        # The shares are of all parts: which ones are missing, processes may see differently.
        mine = [part for part in parts[parallel.rank() :: parallel.world_size()] if part in missing]
        total = sum(len(self._images(part)) for part in mine)
        with tqdm(total=total, desc="features", unit="image", leave=False, disable=not parallel.is_main()) as bar:
            for n_images in self._compute(mine, model, device, autocast, workers):
                bar.update(n_images)
                self._check_signal(interruption)
        while not all(self._file(part).exists() for part in missing):
            self._check_signal(interruption)
            time.sleep(POLL)

    def _open_folder(self, name: str) -> None:
        """Take the folder of this name, in all processes that of the main one: nodes may see other dates of files."""
        if parallel.is_main():
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.folder = self.root / parallel.from_main(name)
        if not self.folder.is_dir():
            raise ValueError(f"--feature-folder {self.root}: give a folder on a disk that all processes share")

    def _check_signal(self, interruption: Interruption | None) -> None:
        if interruption is not None and interruption.status:
            message = f"ended by a signal while {self.folder} was filled: start it again to go on"
            raise SignalError(message, interruption.status)

    @torch.inference_mode()
    def _compute(
        self, parts: list[Part], model: Segmenter, device: torch.device, autocast: Autocast, workers: int
    ) -> Iterator[int]:
        """Compute and write parts; yields the number of images of every batch that is done."""
        items = {part: [(part[0], index) for index in self._images(part)] for part in parts}
        batches = [own[at : at + BATCH] for own in items.values() for at in range(0, len(own), BATCH)]
        start, label_kind = parallel.start_worker, torch.uint8 if self.dataset.n_cls <= IGNORE_LABEL else torch.int32
        loader = iter(DataLoader(self.dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=start))
        for part, own in items.items():
            tokens, labels = [], []
            for batch in islice(loader, -(-len(own) // BATCH)):
                with autocast():
                    tokens.append(model.encode(batch["image"].to(device)).half().cpu())
                labels.append(batch["label"].to(label_kind))
                yield len(labels[-1])
            with atomic(self._file(part), shared=True) as file:
                save_file({"tokens": torch.cat(tokens), "labels": torch.cat(labels)}, file)

    def _check_space(self, model: Segmenter, n_images: int) -> None:
        height, width = self.dataset.crop_size
        gh, gw = model.grid((height, width))
        needed = n_images * (2 * gh * gw * model.encoder.embed_dim + height * width)
        free = shutil.disk_usage(self.folder).free
        if needed > 0.95 * free:
            raise ValueError(
                f"--cache-features {self.n_versions}: takes {needed / 2**30:.1f} GiB in {self.folder}, "
                f"{free / 2**30:.1f} GiB are free: give a smaller number"
            )

    def remove(self) -> None:
        """Delete the features."""
        if parallel.is_main():
            shutil.rmtree(self.root, ignore_errors=True)


def _conditions(model: Segmenter, device: torch.device, autocast: Autocast) -> tuple[Any, ...]:
    """All but the images that features depend on: the encoder's build, its weights, and the precision."""
    weights = hashlib.sha256()
    for name, values in model.encoder.state_dict().items():
        weights.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        weights.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy())
    # The weights do not say how many heads there are, or what is added to a variance.
    build = [
        (name, type(module).__name__, {k: v for k, v in vars(module).items() if isinstance(v, int | float | str)})
        for name, module in model.encoder.named_modules()
    ]
    with autocast():
        mixed = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return weights.hexdigest(), build, str(mixed), torch.get_float32_matmul_precision()


class DecoderOnly(nn.Module):
    """The part of a Segmenter after its encoder; it shares the parameters. size: (height, width) of the images."""

    def __init__(self, model: Segmenter, size: tuple[int, int]) -> None:
        super().__init__()
        self.decoder = model.decoder
        self._decode, self.size = model.decode, size

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, N, D) patch tokens of the encoder -> logits (B, n_cls, H, W)."""
        return self._decode(tokens, self.size)
