"""`torch.compile` for a Segmenter that merges: everything between two merges is one compiled part.

What merges tokens runs as it is, since its result decides the shapes of what follows. So that these shapes repeat, and
with them the CUDA graphs that are replayed for each, merged tokens are padded to a multiple of a bucket.
"""

import copy
from functools import cached_property
from itertools import pairwise
from types import FunctionType

import torch

from patch.blocks import Watchers


def compile(model, bucket=64, mode="reduce-overhead", backend="inductor"):
    """Compile a Segmenter for inference in place; `patch.remove` undoes it, together with the patch.

    The encoder becomes one part up to the first merge, one from each merge to the next, and one after the last; the
    decoder is another. All are compiled in the first pass that needs them, for any number of tokens, and in the mode
    "reduce-overhead" a CUDA graph is recorded for every bucket that occurs. Upsampling stays as it is, and so does a
    pass in which somebody looks inside by a hook (attention maps, similarities). No parameter and no state-dict key
    changes. A copy of the model is compiled too, separately.

    What has run: all of it on the CPU, where there are no CUDA graphs.

    Args:
        model: a `segm.model.segmenter.Segmenter` in evaluation mode, patched or not; patch first, then compile.
        bucket: merged tokens are padded to a multiple of it; it trades the work on padding for fewer CUDA graphs.
        mode: of `torch.compile`, for its inductor backend.
        backend: of `torch.compile`.

    Returns:
        The model. Its passes give no gradients, and refuse to run in training mode with a ValueError. On a GPU, what
        `encoder` and `decoder` themselves return is overwritten by the next pass; what the model returns is not.

    Raises:
        ValueError: a model that is no Segmenter, is in training mode or compiled already, or a bucket below 1.
    """
    if not all(hasattr(model, name) for name in ("encoder", "decoder", "to_grid")):
        raise ValueError(f"cannot compile a {type(model).__name__}: only a Segmenter has the parts")
    if is_compiled(model):
        raise ValueError("the model is compiled already: call patch.remove first")
    if isinstance(bucket, bool) or not isinstance(bucket, int) or bucket < 1:
        raise ValueError(f"bucket {bucket!r}: give a number of tokens from 1")
    _check_inference(model)
    options = {"backend": backend} | ({"mode": mode} if backend == "inductor" else {})
    compilation = Compilation(model, bucket, options)
    model.compilation = compilation
    model.encoder.forward_features = compilation.features
    model.decoder.forward = compilation.scores
    return model


def is_compiled(model):
    """Whether `compile` was applied."""
    return hasattr(model, "compilation")


def uncompile(model):
    """Undo `compile`. Without it, nothing happens."""
    if is_compiled(model):
        del model.compilation, model.encoder.forward_features, model.decoder.forward


class Compilation:
    """Stands in for the forward passes of a Segmenter's encoder and decoder.

    Args:
        model: the Segmenter.
        bucket: see `compile`.
        options: of `torch.compile`.
    """

    def __init__(self, model, bucket, options):
        self.model = model
        self.bucket = bucket
        self.options = options

    def __deepcopy__(self, memo):
        """For a copy of the model: compiled functions know the old one."""
        return Compilation(copy.deepcopy(self.model, memo), self.bucket, self.options)

    @torch.no_grad()
    def features(self, images):
        """What `forward_features` of the encoder gives: (B, 3, H, W) -> (B, P + M, D)."""
        encoder, merging = self.model.encoder, self._merging
        _check_inference(self.model)
        if self._watchers.present():
            return type(encoder).forward_features(encoder, images)
        torch.compiler.cudagraph_mark_step_begin()
        if merging is not None:
            patch_size = encoder.patch_embed.patch_size
            grid = [side // patch for side, patch in zip(images.shape[-2:], patch_size, strict=True)]
            merging.begin(grid, self.bucket)
        first, *others = self._parts
        x = first(images)
        for layer, part in zip(self._layers, others, strict=True):
            x = merging.reduce(x, layer, False)
            _vary(x, 1)
            _vary(merging.key_bias, 3)
            x = part(x)
        return x

    @torch.no_grad()
    def scores(self, x):
        """What `forward` of the decoder gives: (B, M, D) -> (B, M, C)."""
        _check_inference(self.model)
        if self._watchers.present():
            return type(self.model.decoder).forward(self.model.decoder, x)
        if not self._layers:
            return self._decode(x).clone()  # nobody copies them by undoing a merge
        _vary(x, 1)
        return self._decode(x)

    @property
    def _merging(self):
        return getattr(self.model, "merging", None)

    @property
    def _layers(self):
        return () if self._merging is None else self._merging.settings["layers"]

    @cached_property
    def _parts(self):
        """The parts of the encoder: one more than there are merges."""
        bounds = (None, *self._layers, None)
        parts = (encoder_part(self.model.encoder, *ends) for ends in pairwise(bounds))
        return [self._compiled(part) for part in parts]

    @cached_property
    def _decode(self):
        decoder = self.model.decoder

        def decode(x):
            return type(decoder).forward(decoder, x)

        return self._compiled(decode)

    def _compiled(self, part):
        # Dynamo keeps what it compiled by code object, and stops after a few: every part gets one of its own.
        code = part.__code__.replace()
        part = FunctionType(code, part.__globals__, part.__name__, part.__defaults__, part.__closure__)
        return torch.compile(part, **self.options)

    @cached_property
    def _watchers(self):
        """Hooks inside the compiled parts: compiled code would pass them by."""
        own = sum(hasattr(block, "keys_hook") for block in self.model.encoder.blocks) + (self._merging is not None)
        return Watchers([*self.model.encoder.modules(), *self.model.decoder.modules()], own)


def encoder_part(encoder, begin, end):
    """What an encoder does between two merges, as a function of tokens.

    Args:
        encoder: a timm ViT.
        begin: 1-based layer of the merge before; None: the function takes images.
        end: 1-based layer of the merge behind; None: it goes to the end of the features.
    """
    blocks = list(encoder.blocks)
    whole = blocks[begin or 0 : None if end is None else end - 1]

    def run(x):
        if begin is None:
            # `forward` itself: the hook that begins a pass is called outside of the compiled code
            x = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed.forward(x)))
        else:
            x = blocks[begin - 1].feed(x)
        for block in whole:
            x = block(x)
        return encoder.norm(x) if end is None else blocks[end - 1].attend(x)

    return run


def _vary(x, axis):
    """Tell the compiler that a size changes from pass to pass, so that it does not begin with one for this alone."""
    if x is not None and x.shape[axis] > 1:
        torch._dynamo.maybe_mark_dynamic(x, axis)


def _check_inference(model):
    if model.training:
        raise ValueError(
            "a compiled model is for inference, training would compile every number of tokens: "
            "call model.eval() first, or patch.remove to train"
        )
