"""ClustViT: tokens of one learned cluster become one; an image that has one cluster alone keeps all."""

from typing import Any

from torch import Tensor

import g2tm
from patch.learned import add_clusters
from patch.method import Choice, LossInput, ModelShape, Number, Option, Options, Step, register
from patch.methods.common import COUNT, POSITIVE

BATCH = "batch"


def _merge(step: Step) -> g2tm.Reduction:
    """Merge by the most likely cluster of each token."""
    logits = step.encoder.clusterer(step.x)
    ids = logits.argmax(-1)
    is_batch = step.options["cluster_rule"] == BATCH
    skipped = (ids == ids[:1, :1]).all().expand(len(ids)) if is_batch else None
    return g2tm.Clusters(step.x, ids, step.options["clusters"], step.encoder.expand_mlp, skipped, logits)


def _loss(trained: LossInput) -> Tensor:
    """Cross-entropy of the clusters against the label that covers most of each patch."""
    if trained.labels is None:
        raise ValueError("clustvit learns its clusters from the label maps: give them to patch.loss")
    (step,), options = trained.steps.values(), trained.options
    ids = g2tm.cluster_labels(trained.labels, trained.patch_size, options["clusters"])
    return options["cluster_weight"] * g2tm.clustering_loss(step.logits, ids)


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    """The injection point is the published name of the layer."""
    point, layers = given.pop("injection_point", None), given.get("layers")
    if point is None:
        return given
    if layers is not None and layers not in (point, [point], (point,)):
        raise ValueError(f"injection_point {point} and layers {layers} name the same place: give one of them")
    return given | {"layers": [point]}


def _check(options: Options, shape: ModelShape) -> None:
    layers = options["layers"]
    if len(layers) != 1 or layers[0] >= shape.depth:
        raise ValueError(f"layers {list(layers)}: clustvit has one injection point, from 0 to {shape.depth - 1}")
    if options["attention"] != "none":
        raise ValueError(f"attention {options['attention']}: clustvit counts every token as one, give none")


register(
    "clustvit",
    _merge,
    summary="Tokens of a learned cluster merge and are restored.",
    prepare=_prepare,
    check=_check,
    place="block",
    undo="encoder",
    modules=add_clusters,
    training_form=_merge,
    loss=_loss,
    layers=(3,),
    injection_point=Option(
        None, "Number of blocks before the merge, the same as the layer.", type=COUNT, default_text="the layer"
    ),
    clusters=Option(3, "Number of clusters that merge.", type=POSITIVE),
    cluster_width=Option(
        None, "Width of the cluster module, channels.", type=POSITIVE, default_text="129/32 of the model's width"
    ),
    cluster_rule=Option(
        "image",
        "Unit that keeps its tokens if they all have one id: image, or batch.",
        type=Choice(("image", BATCH)),
    ),
    cluster_weight=Option(0.1, "Factor of the clustering loss in the loss of the training.", type=Number(0)),
)
