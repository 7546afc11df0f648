"""Words that other tools use for an option, and the option of Fledge with the same effect.

The words are those of ultralytics, fastai, timm, Keras, PyTorch Lightning and transformers. They
are used in error messages only, except `epochs` of a stage, which `training.config.load` accepts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

LOST: Final = object()
"""A value that has no counterpart here."""


def _same(value: Any) -> Any:
    return value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _one_of(values: Mapping[str, Any], *, others: bool = False) -> Callable[[Any], Any]:
    """Return a function that looks values up, by their text in small letters.

    Args:
        values: Value there -> value here.
        others: Whether another value means the same here; else it has no counterpart.
    """
    return lambda value: values.get(str(value).lower(), value if others else LOST)


def _side(value: Any) -> Any:
    """Return the side of a square image: 224 for 224, [224, 224] and [3, 224, 224]."""
    if isinstance(value, str):
        parts = value.strip("()[] ").replace("x", ",").split(",")
        value = [int(part) for part in parts if part.strip().isdecimal()]
    if not isinstance(value, list | tuple):
        return value
    sides = [side for side in value if side != 3]
    return sides[0] if sides and all(side == sides[0] for side in sides) else LOST


def as_list(value: Any) -> Any:
    """Return the list that a text such as `(0.5, 0.5)` or `[a, b]` means, or `LOST`."""
    if not isinstance(value, str) or value[:1] + value[-1:] not in ("()", "[]"):
        return LOST
    items = [item.strip().strip("\"'") for item in value[1:-1].split(",") if item.strip()]
    try:
        return [float(item) if set(item) & set(".eE") else int(item) for item in items]
    except ValueError:
        return items


def as_name(value: Any) -> Any:
    """Return a text as a name without spaces and accents, or `LOST`: `my-run` for `My run`."""
    if not isinstance(value, str):
        return LOST
    plain = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._") or LOST


def _above_zero(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and value > 0 else LOST


@dataclass(frozen=True)
class Counterpart:
    """What has the effect of another tool's option here.

    Attributes:
        option: An option of the recipe, such as "optimizer.kind"; "stage.lr" is the option of each
            stage.
        flag: An option of the command line, such as "--data".
        value: Function from the value there to the value here, or to `LOST`.
        note: What to know beside it, or instead of it if there is no such option.
    """

    option: str = ""
    flag: str = ""
    value: Callable[[Any], Any] = _same
    note: str = ""


_DEVICE: Final = {
    **{str(number): "cuda" for number in range(16)},
    **{f"cuda:{number}": "cuda" for number in range(16)},
    **dict.fromkeys(("cuda", "gpu", "true"), "cuda"),
    **dict.fromkeys(("cpu", "-1"), "cpu"),
    "auto": "auto",
}
_SCHEDULES: Final = {
    **dict.fromkeys(("cosine", "cos", "cosineannealinglr", "cosineannealing", "true"), "cosine"),
    **dict.fromkeys(
        ("onecycle", "one_cycle", "1cycle", "onecyclelr", "fit_one_cycle"), "one_cycle"
    ),
    **dict.fromkeys(("step", "multistep", "steplr", "multisteplr"), "step"),
    **dict.fromkeys(("plateau", "reducelronplateau"), "plateau"),
    **dict.fromkeys(("constant", "none", "constantlr", "fixed"), "constant"),
    **dict.fromkeys(("cosineannealingwarmrestarts", "cosine_restarts", "sgdr"), "sgdr"),
}
_POLICIES: Final = {
    **dict.fromkeys(("randaugment", "rand_augment", "randaug", "ra"), "rand_augment"),
    **dict.fromkeys(("trivialaugment", "trivialaugmentwide", "ta_wide"), "trivial_augment"),
    **dict.fromkeys(("none", "false", ""), "none"),
}
_PRECISIONS: Final = {
    **dict.fromkeys(("true", "auto", "16-mixed", "bf16-mixed"), "auto"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
    **dict.fromkeys(("false", "fp32", "float32", "32", "32-true"), "fp32"),
}
_PRETRAINED: Final = {
    **dict.fromkeys(("true", "imagenet", "default"), "imagenet"),
    **dict.fromkeys(("false", "none", "no"), "none"),
}
_FITS: Final = {
    **dict.fromkeys(("crop", "center", "centre", "center_crop", "resizemethod.crop"), "crop"),
    **dict.fromkeys(("squish", "squash", "stretch", "resizemethod.squish"), "squish"),
    **dict.fromkeys(("pad", "border", "letterbox", "resizemethod.pad"), "pad"),
}
_NO_COUNTERPART: Final = "Fledge has no such option: leave it out"

_TABLE: Final[tuple[tuple[str, Counterpart], ...]] = (
    (
        "epochs epoch num_epochs n_epochs n_epoch nb_epoch nb_epochs max_epochs total_epochs "
        "num_train_epochs train_epochs fine_tune",
        Counterpart("stage.epochs"),
    ),
    (
        "lr lr0 learning_rate base_lr init_lr initial_lr lr_max max_lr lr_init",
        Counterpart("stage.lr", value=_above_zero),
    ),
    ("lrf", Counterpart("stage.floor")),
    (
        "min_lr lr_min eta_min final_lr",
        Counterpart("stage.floor", value=lambda _: LOST, note="it is a share of the rate"),
    ),
    (
        "imgsz img_size image_size input_size img_sz imgsize size resolution image_resolution "
        "target_size resize crop_size input_shape",
        Counterpart("preprocess.size", value=_side),
    ),
    (
        "batch bs batch_size batchsize train_batch_size per_device_train_batch_size "
        "mini_batch_size b",
        Counterpart("batch_size", value=_one_of({"-1": "auto"}, others=True)),
    ),
    (
        "model arch architecture backbone network net model_name encoder base_model",
        Counterpart("arch", value=_lower, note="`fledge layers` lists the networks"),
    ),
    (
        "device gpu gpus accelerator cuda",
        Counterpart(flag="--device", value=_one_of(_DEVICE)),
    ),
    (
        "workers num_workers dataloader_num_workers n_workers nproc",
        Counterpart(note="all cores that the process may use are used: leave it out"),
    ),
    (
        "patience early_stopping early_stopping_patience es_patience",
        Counterpart("stage.patience", value=_above_zero),
    ),
    (
        "optimizer optimiser opt optim optimizer_name opt_func",
        Counterpart("optimizer.kind", value=_lower),
    ),
    (
        "fit_one_cycle one_cycle onecycle",
        Counterpart("stage.schedule", value=lambda _: "one_cycle", note="with stage.NAME.epochs"),
    ),
    ("wd weight_decay l2 decay", Counterpart("optimizer.weight_decay")),
    ("momentum mom beta1", Counterpart("optimizer.momentum")),
    (
        "betas beta2 adam_beta1 adam_beta2",
        Counterpart(note="optimizer.momentum is the first beta, and the second is 0.999"),
    ),
    ("nesterov", Counterpart("optimizer.nesterov")),
    (
        "clip_grad clip_norm clip_grad_norm gradient_clip_val max_grad_norm grad_clip clipnorm",
        Counterpart("optimizer.clip_norm"),
    ),
    (
        "accumulate accumulate_grad_batches gradient_accumulation_steps grad_accum "
        "grad_accum_steps accum_iter",
        Counterpart("optimizer.accumulate"),
    ),
    ("ema ema_decay model_ema_decay", Counterpart("optimizer.ema")),
    (
        "model_ema use_ema",
        Counterpart("optimizer.ema", value=_one_of({"true": 0.99, "false": 0.0})),
    ),
    (
        "sched scheduler lr_scheduler lr_schedule lr_sched schedule lr_scheduler_type cos_lr",
        Counterpart("stage.schedule", value=_one_of(_SCHEDULES)),
    ),
    ("warmup_epochs warmup warm_up warmup_epoch", Counterpart("stage.warm_up")),
    (
        "warmup_steps warmup_ratio num_warmup_steps",
        Counterpart("stage.warm_up", value=lambda _: LOST, note="it counts epochs"),
    ),
    (
        "drop_path drop_path_rate stochastic_depth",
        Counterpart(
            note="stochastic depth is an option of some networks, such as EfficientNet and "
            "ConvNeXt: arch_args.stochastic_depth_prob"
        ),
    ),
    ("smoothing label_smoothing ls", Counterpart("label_smoothing")),
    ("mixup mixup_alpha mixup_prob", Counterpart("augment.mixup")),
    ("cutmix cutmix_alpha", Counterpart("augment.cutmix")),
    ("dropout drop drop_rate dropout_rate ps", Counterpart("head.dropout")),
    (
        "lin_ftrs hidden hidden_size hidden_units hidden_dim num_hidden",
        Counterpart("head.hidden"),
    ),
    ("reprob erasing random_erasing erase re_prob", Counterpart("augment.erase")),
    ("degrees rotation rotation_range max_rotate rotate", Counterpart("augment.max_rotate")),
    (
        "translate shift width_shift_range height_shift_range max_shift",
        Counterpart("augment.max_shift"),
    ),
    ("perspective max_warp warp", Counterpart("augment.max_warp")),
    (
        "hsv_v brightness max_lighting lighting brightness_range color_jitter colour_jitter",
        Counterpart("augment.max_lighting", value=_above_zero),
    ),
    ("hsv_s saturation max_saturation", Counterpart("augment.max_saturation")),
    ("hsv_h hue max_hue hue_shift", Counterpart("augment.max_hue")),
    (
        "fliplr hflip horizontal_flip do_flip flip",
        Counterpart(
            "augment.flip",
            value=lambda value: {
                "true": "horizontal",
                "false": "none",
                "0": "none",
                "0.0": "none",
            }.get(
                str(value).lower(),
                "horizontal" if isinstance(value, int | float) else value,
            ),
        ),
    ),
    (
        "flipud vflip vertical_flip",
        Counterpart("augment.flip", value=_one_of({"true": "dihedral", "0.5": "dihedral"})),
    ),
    (
        "aa auto_augment autoaugment policy randaugment rand_augment",
        Counterpart("augment.policy", value=_one_of(_POLICIES)),
    ),
    ("augment augmentation aug transforms", Counterpart("augment.preset")),
    ("no_augment no_aug", Counterpart("augment.preset", value=lambda _: "none")),
    ("no_pretrained from_scratch", Counterpart("weights", value=lambda _: "none")),
    ("seed random_seed random_state manual_seed rng_seed", Counterpart("seed")),
    (
        "save_dir output output_dir out outdir out_dir project exp_dir run_dir log_dir logdir "
        "default_root_dir checkpoint_dir dest",
        Counterpart(flag="--out"),
    ),
    ("name experiment experiment_name run_name exp_name exp", Counterpart("name")),
    (
        "pretrained weights use_pretrained",
        Counterpart("weights", value=_one_of(_PRETRAINED, others=True)),
    ),
    (
        "checkpoint ckpt initial_checkpoint init_checkpoint pretrained_weights load",
        Counterpart("weights"),
    ),
    (
        "resume resume_from resume_from_checkpoint ckpt_path",
        Counterpart(flag="--resume", value=_one_of({"true": "runs/latest"}, others=True)),
    ),
    (
        "freeze frozen freeze_encoder freeze_backbone freeze_body",
        Counterpart(
            "stage.unfreeze",
            value=_one_of({"true": 0, "false": "all"}),
            note="it is the number of layer groups that train, from the end",
        ),
    ),
    (
        "freeze_layers freeze_n unfreeze_layers freeze_to trainable_layers layers",
        Counterpart(
            "stage.unfreeze",
            value=lambda _: LOST,
            note="it is the number of layer groups that train, from the end",
        ),
    ),
    ("unfreeze", Counterpart("stage.unfreeze")),
    (
        "freeze_bn bn_freeze",
        Counterpart("stage.batchnorm", value=_one_of({"true": "fixed", "false": "train"})),
    ),
    (
        "data dataset data_dir datadir data_path dataset_path train_dir train_data root path "
        "photos images",
        Counterpart(flag="--data"),
    ),
    (
        "val val_split validation_split valid_pct valid val_ratio test_size val_size valid_size",
        Counterpart("data.valid"),
    ),
    ("folds k_folds n_folds n_splits kfold num_folds", Counterpart("data.folds")),
    ("fold val_fold", Counterpart("data.fold")),
    (
        "classes nc num_classes n_classes class_names n_out",
        Counterpart(note="the photos determine the classes: leave it out"),
    ),
    (
        "amp half fp16 mixed_precision use_amp to_fp16 dtype precision",
        Counterpart("precision", value=_one_of(_PRECISIONS)),
    ),
    ("cache", Counterpart(flag="--cache-gb", value=_above_zero)),
    ("tta test_time_augmentation", Counterpart("tta.count", value=_above_zero)),
    ("interpolation", Counterpart("preprocess.interpolation", value=_lower)),
    ("crop_pct", Counterpart("preprocess.crop")),
    (
        "crop_mode resize_method resize_mode resizemethod",
        Counterpart("preprocess.fit", value=_one_of(_FITS)),
    ),
    (
        "letterbox pad_to_aspect_ratio do_pad",
        Counterpart("preprocess.fit", value=_one_of({"true": "pad"})),
    ),
    (
        "crop_to_aspect_ratio do_center_crop center_crop centre_crop",
        Counterpart("preprocess.fit", value=_one_of({"true": "crop", "false": "squish"})),
    ),
    ("squish squash stretch", Counterpart("preprocess.fit", value=_one_of({"true": "squish"}))),
    ("mean", Counterpart("preprocess.mean")),
    ("std", Counterpart("preprocess.std")),
    (
        "loss criterion loss_func loss_fn",
        Counterpart(note="the loss is the cross-entropy, with label_smoothing: leave it out"),
    ),
    (
        "class_weight class_weights cls_weight pos_weight",
        Counterpart(note="classes have no weights here: leave it out"),
    ),
    (
        "verbose plots exist_ok rect deterministic single_cls profile save save_period metrics "
        "callbacks cbs monitor task mode cls box dfl nbs close_mosaic mosaic shear "
        "overlap_mask",
        Counterpart(note=_NO_COUNTERPART),
    ),
)

WORDS: Final[dict[str, Counterpart]] = {
    word: found for words, found in _TABLE for word in words.split()
}
"""Word of another tool, in small letters and with underscores -> its counterpart."""

OF_OPTION: Final[dict[str, list[Counterpart]]] = {
    option: [
        found
        for _, found in _TABLE
        if found.option == option and found.value(LOST) is LOST  # `fit_one_cycle` sets it alone
    ]
    for option in {found.option for _, found in _TABLE if found.option}
}
"""Option of the recipe -> the counterparts in which other tools' values for it are known."""

IN_A_STAGE: Final[dict[str, str]] = {"preprocess.size": "stage.image_size"}
"""Option of the recipe -> the option of a stage that is meant inside a stage."""

MAIN: Final[dict[str, str]] = {
    "optimizer": "kind",
    "head": "kind",
    "augment": "preset",
    "tta": "count",
    "preprocess": "size",
    "lr_find": "pick",
    "data": "csv",
}
"""Table of the recipe -> the option that is meant if the table is given a value."""


def find(word: str) -> Counterpart | None:
    """Return the counterpart of another tool's word, or None; case and dashes do not matter."""
    return WORDS.get(word.lower().replace("-", "_"))
