"""Build a Segmenter from its settings or from a run directory."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_patch_embed
from torch import nn

from segm.checkpoint import checkpoint_file, load_checkpoint
from segm.config import RunConfig, recorded_grid, variant_file
from segm.errors import one_line
from segm.model.decoder import create_decoder
from segm.model.encoder import add_queries, create_encoder, position_prefix, resize_position_embedding
from segm.model.linear import use_onednn_linear
from segm.model.pretrained import fit_bands, load_pretrained
from segm.model.segmenter import Segmenter

logger = logging.getLogger(__name__)


Parts = Callable[[nn.Module, Mapping[str, Any]], object]


def create_segmenter(
    net_kwargs: Mapping[str, Any], pretrained: bool | str | Path = False, parts: Parts | None = None
) -> Segmenter:
    """Build a Segmenter, with the linear layers of `segm.model.linear` where they are faster.

    Args:
        net_kwargs: the `net_kwargs` of a `variant.yml`: `backbone`, `n_cls`, `decoder` {`name`, ...}, and optionally
            `image_size`, `patch_size`, `d_model`, `n_heads`, `n_layers`, `bands`, `dropout`, `drop_path_rate`,
            `distilled`.
        pretrained: weights of the encoder: False (random), True (timm's) or a file.
        parts: builds the learned parts of a merging method, which `net_kwargs` ask for by `reduction` {`name`, ...};
            called with the encoder and this mapping.

    Raises:
        ValueError: a setting that is missing, unknown or does not fit.
        FileNotFoundError, ConnectionError: pretrained weights that cannot be had.
    """
    if not isinstance(net_kwargs.get("decoder", {}), dict):
        raise ValueError("net_kwargs: decoder is no mapping, it needs a name")
    missing = [name for name in ("backbone", "n_cls", "decoder") if name not in net_kwargs]
    if missing:
        raise ValueError(f"net_kwargs lack {', '.join(missing)}: they need backbone, n_cls and decoder")
    encoder = create_encoder(net_kwargs)
    if pretrained:
        load_pretrained(encoder, net_kwargs["backbone"], pretrained)
    if net_kwargs["decoder"].get("name") == "eomt":
        add_queries(encoder, net_kwargs["decoder"].get("n_queries", 100), net_kwargs["decoder"].get("n_blocks", 3))
    reduction, n_cls = net_kwargs.get("reduction"), net_kwargs["n_cls"]
    if reduction:
        if parts is None:
            raise ValueError(f"the model has learned parts of {reduction.get('name')}: load it with segm.run.Run")
        parts(encoder, reduction)
    depth, patch_side = len(encoder.blocks), min(encoder.patch_embed.patch_size)
    decoder, aux_heads = create_decoder(encoder.embed_dim, n_cls, net_kwargs["decoder"], depth, patch_side)
    model = Segmenter(encoder, decoder, n_cls, aux_heads)
    if model.on_grid:
        encoder.norm.requires_grad_(False)  # blocks are read before it
    return use_onednn_linear(model)


def load_model(path: str | Path, parts: Parts | None = None) -> tuple[Segmenter, RunConfig]:
    """Load a trained Segmenter in evaluation mode, on the CPU.

    Args:
        path: a checkpoint, or a run directory (then its `checkpoint.pth`); `variant.yml` is next to it.
        parts: see `create_segmenter`.

    Returns:
        (model, config): config is what `variant.yml` says.

    Raises:
        FileNotFoundError: no checkpoint or no `variant.yml`.
        ValueError: a damaged file, or weights that do not fit `variant.yml`.
    """
    checkpoint_file(path)  # a missing checkpoint is named before a missing variant.yml
    config = RunConfig.read(path)
    weights = load_checkpoint(path)["model"]
    try:
        with torch.device("meta"):  # other weights are named before the network takes the memory that a file asks for
            create_segmenter(config.net_kwargs, parts=parts).load_state_dict(weights, assign=True)
        model = create_segmenter(config.net_kwargs, parts=parts)
    except ValueError as error:
        raise ValueError(f"{variant_file(path)}: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the net_kwargs of its variant.yml: {one_line(error)}") from error
    model.load_state_dict(weights)
    return model.eval(), config


def copy_weights(model: Segmenter, path: str | Path, same_classes: bool = True) -> None:
    """Copy the weights of another run into a model, to fine-tune it.

    The position embedding is resized to the model's grid, and the patch embedding to its patches, as timm does it.
    Class-dependent weights keep their initial values if the classes differ.

    Args:
        model: a Segmenter.
        path: checkpoint or run directory, with its `variant.yml`.
        same_classes: whether the classes have the same names, in the same order; their numbers are compared anyhow.

    Raises:
        ValueError: the architectures differ.
    """
    weights, own = dict(load_checkpoint(path)["model"]), model.state_dict()
    last_layers = ("decoder.cls_emb", "decoder.mask_norm", "decoder.head", "decoder.query")
    of_classes = {name for name in own if name.startswith(last_layers) or ".conv_seg." in name}
    if not same_classes or any(k in weights and weights[k].shape != own[k].shape for k in of_classes):
        logger.warning("%s has other classes: class-dependent weights are reinitialized", path)
        weights |= {k: own[k] for k in of_classes}
    encoder, name, kernel = model.encoder, "encoder.pos_embed", "encoder.patch_embed.proj.weight"
    fit_bands(encoder, weights, "encoder.")
    sides = weights[kernel].shape[2:] if kernel in weights else ()
    if sides and weights[kernel].shape[:2] == own[kernel].shape[:2]:
        weights[kernel] = resample_patch_embed(weights[kernel], [*encoder.patch_embed.patch_size])
    if name in weights and name in own and weights[name].shape != own[name].shape:
        grid, prefix = recorded_grid(path, sides), position_prefix(encoder)
        if grid is not None and grid[0] * grid[1] + prefix == weights[name].shape[1]:
            new_grid = encoder.patch_embed.grid_size
            weights[name] = resize_position_embedding(weights[name].float(), grid, new_grid, prefix)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the requested model: {one_line(error)}") from error
