"""Build a Segmenter from its settings or from a run directory."""

from segm.checkpoint import checkpoint_file, load_checkpoint, read_variant
from segm.model.decoder import create_decoder
from segm.model.encoder import create_encoder
from segm.model.segmenter import Segmenter


def create_segmenter(net_kwargs, pretrained=False):
    """Build a Segmenter.

    Args:
        net_kwargs: the `net_kwargs` of a `variant.yml`: `backbone`, `n_cls`, `decoder` {`name`, ...}, and optionally
            `image_size`, `patch_size`, `d_model`, `n_heads`, `n_layers`, `dropout`, `drop_path_rate`, `distilled`.
        pretrained: weights of the encoder: False (random), True (timm's) or a file.

    Raises:
        ValueError: a setting that is missing, unknown or does not fit.
        FileNotFoundError, ConnectionError: pretrained weights that cannot be had.
    """
    missing = [name for name in ("backbone", "n_cls", "decoder") if name not in net_kwargs]
    if missing:
        raise ValueError(f"net_kwargs lack {', '.join(missing)}: they need backbone, n_cls and decoder")
    encoder = create_encoder(net_kwargs, pretrained)
    n_cls = net_kwargs["n_cls"]
    return Segmenter(encoder, create_decoder(encoder.embed_dim, n_cls, net_kwargs["decoder"]), n_cls)


def load_model(path):
    """Load a trained Segmenter in evaluation mode, on the CPU.

    Args:
        path: a checkpoint, or a run directory (then its `checkpoint.pth`); `variant.yml` stands beside it.

    Returns:
        (model, variant): variant is the content of `variant.yml`.

    Raises:
        FileNotFoundError: no checkpoint or no `variant.yml`.
        ValueError: a damaged file, or weights that do not fit `variant.yml`.
    """
    checkpoint_file(path)  # a missing checkpoint is named before a missing variant.yml
    variant = read_variant(path)
    model = create_segmenter(variant["net_kwargs"])
    weights = load_checkpoint(path)["model"]
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit the net_kwargs of its variant.yml: {detail}") from error
    return model.eval(), variant
