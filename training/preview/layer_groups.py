"""Implement `fledge layers`: list the layers of a network, and the layers that each stage trains.

Networks are built on the meta device, without weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from serving.utils.natural_sort import natural_letters_first
from training.config.schema import Recipe, Stage
from training.engine.plan import stages_of
from training.models import backbones, heads
from training.models.backbones import Backbone
from training.models.classifier import Classifier, name_range
from training.models.families import FAMILIES
from training.models.freezing import Freezing, has_batchnorm, is_batchnorm, shares_from

CLASSES = 2
"""Number of classes of the head whose parameters are counted; a recipe does not define it."""


def families() -> list[str]:
    """List all architectures, one line per family."""
    names = sorted(backbones.names(), key=natural_letters_first)
    rows = [
        (family.title, " ".join(name for name in names if backbones.family_of(name) is family))
        for family in FAMILIES
    ]
    return _table(rows)


def describe(recipe: Recipe) -> list[str]:
    """Describe the body of a recipe's network, with one line per layer.

    A line contains:

    - the smallest number of `unfreeze` that trains the layer; only for the first layer of a group;
    - the share of the weight layers from this layer to the end, which is the value of `unfreeze`
      that trains from this layer on; only for layers with weights;
    - name and kind of the layer;
    - number of parameters;
    - shape of the output for one image of side `preprocess.size`: channels x height x width, or
      tokens x channels.

    Raises:
        OptionError: The network can't be built, or the image size does not fit the network.
    """
    size = recipe.preprocess.size
    backbones.check_size(recipe.arch, recipe.arch_args, size)
    backbone = backbones.build_on_meta(recipe.arch, recipe.arch_args)
    family = backbones.family_of(recipe.arch)
    shares = shares_from(backbone.body)
    rows = [("unfreeze", "share", "layer", "kind", "parameters", f"output at {size}")]
    outputs = backbones.meta_outputs(backbone.body, size)
    for index, ((name, child), output) in enumerate(
        zip(backbone.body.named_children(), outputs, strict=True)
    ):
        starts = backbone.groups.index(index) if index in backbone.groups else None
        unfreeze = "" if starts is None else str(len(backbone.groups) - starts)
        count = _thousands(child.parameters())
        share = f"{shares[index]:.3f}" if shares.get(index, 1.0) < 1 else ""
        shape = _shape(output, family.side)
        rows.append((unfreeze, share, name, type(child).__name__, count, shape))
    pools = f", pools by itself ({backbone.pooled})" if backbone.pooled else ""
    total = _thousands(backbone.body.parameters())
    norms = "" if has_batchnorm(backbone.body) else ", no BatchNorm"
    return [
        f"{recipe.arch} ({family.title}): {total} parameters, {len(backbone.groups)} layer groups, "
        f"{backbone.width} features{pools}{norms}",
        "",
        *_table(rows, right=(0, 1, 4)),
    ]


def stages(recipe: Recipe) -> list[str]:
    """Describe the layers that each stage of a recipe trains and freezes, with one line per stage.

    Raises:
        OptionError: The network can't be built, or an option of the head or of a stage does not fit
            the network.
    """
    pool = heads.build_pool(recipe.head, recipe.arch, backbones.family_of(recipe.arch).pooled)
    backbone = backbones.build_on_meta(recipe.arch, recipe.arch_args)
    head = heads.build(recipe.head, backbone.width, CLASSES).to("meta")
    classifier = Classifier(backbone.body, backbone.groups, pool, head)
    rows = [("stage", "trains", "parameters", "BatchNorms", "kept outputs of the frozen part")]
    for stage in stages_of(recipe, recipe.weights != "none"):
        freezing = classifier.freezing_for(stage)
        groups = classifier.trainable_groups(freezing)
        count = _thousands(p for _, parameters in groups for p in parameters)
        names = ", ".join(name for name, _ in groups)
        norms = _batchnorms(classifier, freezing)
        cached = _cached_outputs(classifier, freezing.prefix, backbone, recipe, stage)
        rows.append((stage.name, names, count, norms, cached))
    total = _thousands(classifier.parameters())
    return [f"{recipe.name}: {total} parameters with a head for {CLASSES} classes", "",
            *_table(rows, right=(2,))]  # fmt: skip


def of_arch(arch: str) -> Recipe:
    """Return a recipe with this architecture and its usual image size; the rest is default.

    Raises:
        OptionError: The architecture is unknown.
    """
    size = {"inception_v3": 299}.get(arch, backbones.family_of(arch).image_size({}))
    stage = {"name": "head"}
    return Recipe.model_validate(
        {"name": "layers", "arch": arch, "stage": [stage], "preprocess": {"size": size}}
    )


def _batchnorms(classifier: Classifier, freezing: Freezing) -> str:
    """Describe how many BatchNorm layers are in each mode, such as "20 fixed"."""
    counts: dict[str, int] = {}
    for name, module in classifier.body.named_modules():
        if not is_batchnorm(module):
            continue
        moves = name not in freezing.eval_modules
        affine = any(f"{name}.{own}" in freezing.trainable for own, _ in module.named_parameters())
        what = {
            (False, False): "fixed",
            (False, True): "with fixed statistics",
            (True, False): "whose statistics move",
            (True, True): "trained",
        }[moves, affine]
        counts[what] = counts.get(what, 0) + 1
    return ", ".join(f"{count} {what}" for what, count in counts.items()) or "none"


def _cached_outputs(
    classifier: Classifier, prefix: int, backbone: Backbone, recipe: Recipe, stage: Stage
) -> str:
    if not prefix:
        return "none"
    if not stage.views:
        return "none: views = 0"
    if recipe.augment_of(stage).mixes:
        return "none: photos are mixed"
    names = [name for name, _ in backbone.body.named_children()][:prefix]
    *_, last = backbones.meta_outputs(backbone.body[:prefix], recipe.preprocess_of(stage).size)
    shape = list((classifier.pool(last) if prefix == len(backbone.body) else last).shape[1:])
    return f"{name_range(names)}: {' x '.join(map(str, shape))}, {stage.wanted_views} views"


def _shape(output: Tensor, side: int) -> str:
    sizes = list(output.shape[1:])
    if side == 1 and len(sizes) == 3 and sizes[0] == sizes[1]:  # Swin's channels are last
        sizes = [sizes[2], *sizes[:2]]
    return " x ".join(map(str, sizes))


def _thousands(parameters: Iterable[nn.Parameter]) -> str:
    """Format the number of parameters: 832, 14.3 k, 2.22 M."""
    count = sum(p.numel() for p in parameters)
    if count < 1000:
        return str(count)
    return f"{count / 1e3:.1f} k" if count < 999_950 else f"{count / 1e6:.2f} M"


def _table(rows: Sequence[tuple[str, ...]], right: Sequence[int] = ()) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def cells(row: tuple[str, ...]) -> Iterator[str]:
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            yield cell.rjust(width) if i in right else cell.ljust(width)

    return ["  ".join(cells(row)).rstrip() for row in rows]
