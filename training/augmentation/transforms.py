"""Random augmentation of batches: a geometric warp, RandAugment, a colour change, random erasing.

The random parameters are a function of the seed, the number of the augmented view, and the photo's
index. They do not depend on the order of batches. View number n of a photo is therefore always the
same picture, and outputs of frozen layers for it can be cached. Each option has its own random
numbers. Switching on one option does not change the random numbers of the others.

Crop, flip, perspective, zoom, rotation and shift are combined into one geometric warp, which comes
first. The next steps are RandAugment or TrivialAugment (see `training.augmentation.policies`), then
the change of brightness, contrast, saturation and hue, then random erasing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.augmentation.policies import apply_policy
from training.config.sections import AugmentConfig
from training.utils.device import constant, upload

MEAN_COLOUR: Final = (124, 116, 104)
"""Colour of erased rectangles: ImageNet's mean RGB colour, about 0 after normalisation."""

ERASED_AREA: Final = (0.02, 0.33)
"""Range of the erased area as a share of the picture: torchvision's default.

The paper (Zhong et al., 2020, "Random Erasing") uses 0.02 to 0.4.
"""
ERASED_RATIO: Final = 10 / 3
"""Largest aspect ratio of the erased rectangle (Zhong et al.)."""

_LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601
_NUMBERS: Final = 24  # uniform random numbers per photo


@dataclass(frozen=True)
class AugmentationParams:
    """Random augmentation parameters of N photos.

    Attributes:
        warp: Homography of each photo, float32 [N, 3, 3]: coordinates in the output image ->
            coordinates in the photo, both in [-1, 1].
        colour: Contrast factor, brightness shift as a share of the full range, saturation factor,
            and cosine and sine of the rotation of the hue, float32 [N, 5].
        hole: Left, top, right and bottom of the erased rectangle as shares of the side, float32
            [N, 4]; all 0 if nothing is erased.
        seed: Random seed of RandAugment or TrivialAugment for each photo, int64 [N].
    """

    warp: Tensor
    colour: Tensor
    hole: Tensor
    seed: Tensor

    def __len__(self) -> int:
        """Number of photos."""
        return len(self.seed)

    def __getitem__(self, index: Tensor | slice) -> AugmentationParams:
        """Return the parameters of the selected photos. index: int64 [n], or a slice."""
        return AugmentationParams(
            self.warp[index], self.colour[index], self.hole[index], self.seed[index]
        )

    def to(self, device: torch.device) -> AugmentationParams:
        """Copy the parameters to a device."""
        parts = (self.warp, self.colour, self.hole, self.seed)
        return AugmentationParams(*(upload(part, device) for part in parts))


def draw(
    config: AugmentConfig, aspect: Tensor, seed: int, view: int, *, crop: float = 1.0
) -> AugmentationParams:
    """Draw the random parameters of one augmented view of every photo.

    The parameters of photo i depend on i and `aspect[i]`, not on the other photos.

    Args:
        config: Augmentation options; they set the ranges of the random parameters.
        aspect: Width / height of each photo, float32 [N].
        seed, view: Random seed and number of the view; both at least 0.
        crop: Share of the short side that validation keeps (`Preprocess.kept_share`). If
            `config.crop` is "center", the side of the crop is multiplied by this share.
    """
    numbers = np.random.default_rng([seed, view]).random((len(aspect), _NUMBERS))
    # [0, 1); each option below has its own columns. Column 5 is unused.
    u = list(torch.from_numpy(numbers).T)
    s = [2 * column - 1 for column in u]  # [-1, 1)
    hue = 2 * math.pi * config.max_hue * s[20]
    colour = torch.stack(
        [
            1 + s[10] * config.max_lighting,
            s[11] * config.max_lighting,
            1 + s[12] * config.max_saturation,
            torch.cos(hue),
            torch.sin(hue),
        ],
        dim=1,
    )
    warp = _warp(config, aspect.double(), u, s, crop) @ _flips(config, len(aspect), seed, view)
    return AugmentationParams(
        warp.float(),
        colour.float(),
        _hole(config.erase, *u[13:18]).float(),
        (u[18] * 2**31).long(),
    )


def _warp(
    config: AugmentConfig, aspect: Tensor, u: list[Tensor], s: list[Tensor], crop: float
) -> Tensor:
    """Compute the homographies `AugmentationParams.warp` without flips in float64, [N, 3, 3].

    Inside this function, lengths are in units of the photo's short side.
    """
    low, high = config.scale
    zoom = 1 + u[6] * (config.max_zoom - 1)
    side = torch.sqrt(low + u[0] * (high - low)) / zoom
    if config.crop == "center":
        side = side * crop
    stretch = torch.exp(s[1] * math.log(config.ratio) / 2)
    width, height = aspect.clamp(min=1), (1 / aspect).clamp(min=1)
    crop_width = torch.minimum(side * stretch, width)
    crop_height = torch.minimum(side / stretch, height)
    x, y = s[7] * config.max_shift * crop_width, s[8] * config.max_shift * crop_height
    if config.crop == "random":
        x = x + s[3] * (width - crop_width) / 2
        y = y + s[4] * (height - crop_height) / 2
    angle = torch.deg2rad(s[2] * config.max_rotate)
    cos, sin = torch.cos(angle), torch.sin(angle)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    last = [zero, zero, one]

    warp = _rows([2 / width, zero, zero], [zero, 2 / height, zero], last)
    warp = warp @ _rows([cos, -sin, x], [sin, cos, y], last)
    warp = warp @ _rows([crop_width / 2, zero, zero], [zero, crop_height / 2, zero], last)
    if config.max_warp:
        warp = warp @ _tilt(s[9] * config.max_warp)
        swap = _SYMMETRIES[4]
        warp = warp @ swap @ _tilt(s[19] * config.max_warp) @ swap
    return warp


def _flips(config: AugmentConfig, photos: int, seed: int, view: int) -> Tensor:
    """Return the symmetry of the square for one view of every photo: float64 [N, 3, 3].

    The symmetries take turns in a random order that each photo has for itself. So of two
    consecutive views of a photo one is mirrored, or eight consecutive views have the 8 symmetries
    (Jordan, 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU": alternating flip, there of
    mirroring alone).
    """
    count = {"none": 1, "horizontal": 2, "dihedral": 8}[config.flip]
    order = np.random.default_rng([seed, 0, 1]).random((photos, count)).argsort(axis=1)
    return _SYMMETRIES[torch.from_numpy(order[:, view % count])]


def _rows(*rows: list[Tensor]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _symmetries() -> Tensor:
    """Return the 8 symmetries of the square, float64 [8, 3, 3]. 0: identity; 1: horizontal flip."""
    matrices = torch.zeros(8, 3, 3, dtype=torch.float64)
    for i in range(8):
        x, y = (1 - 2 * (i & 1), 1 - (i & 2))
        matrices[i] = torch.diag(torch.tensor([x, y, 1.0], dtype=torch.float64))
        if i & 4:
            matrices[i] = matrices[i][[1, 0, 2]]
    return matrices


_SYMMETRIES: Final = _symmetries()


def _tilt(shrink: Tensor) -> Tensor:
    """Return homographies [N, 3, 3] that make the left or right edge of a square shorter.

    shrink: Share by which an edge becomes shorter, [N]. Positive values shorten the right edge,
    negative values the left edge.
    """
    p = shrink / (2 - shrink.abs())
    zero, one = torch.zeros_like(p), torch.ones_like(p)
    return _rows([one, zero, p], [zero, 1 - p.abs(), zero], [p, zero, one])


def _hole(
    probability: float, chance: Tensor, area: Tensor, ratio: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """Compute the erased rectangles of "Random Erasing" (Zhong et al., 2020).

    Args:
        probability: Probability that a photo gets a rectangle.
        chance, area, ratio, x, y: Uniform random numbers in [0, 1), one per photo, [N]. They are
            not the final values. This function computes from them whether a photo gets a rectangle
            (`chance`), and the area, aspect ratio and position of the rectangle.

    Returns:
        `AugmentationParams.hole` in float64, [N, 4]. The logarithm of the aspect ratio is uniformly
        distributed over the ratios, up to `ERASED_RATIO`, for which the rectangle fits into the
        picture.
    """
    low, high = ERASED_AREA
    area = low + area * (high - low)
    widest = torch.log((1 / area).clamp(max=ERASED_RATIO))
    stretch = torch.exp((2 * ratio - 1) * widest / 2)
    width, height = area.sqrt() * stretch, area.sqrt() / stretch
    left, top = x * (1 - width), y * (1 - height)
    hole = torch.stack([left, top, left + width, top + height], dim=1)
    return hole * (chance < probability)[:, None]


def apply(pixels: Tensor, params: AugmentationParams, config: AugmentConfig, size: int) -> Tensor:
    """Augment a batch of photos: uint8 [N, S, S, 3] -> float32 [N, size, size, 3] in 0..255.

    On a CPU, the result for a photo is bit for bit the same in every batch.

    Args:
        pixels: Whole photos, resized to squares. The warp restores their aspect ratios.
        params: Augmentation parameters of these photos, on the device of `pixels`.
        config: The augmentation options that `params` was drawn with.
        size: Side of the result in pixels.
    """
    images = pixels.permute(0, 3, 1, 2).float()
    grid = _grid(params.warp, size, projective=config.max_warp > 0)
    # Rotation samples beyond the edge; reflection avoids black corners, which reveal the rotation.
    images = F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    if config.policy != "none":
        images = apply_policy(images, params.seed, config, fill=MEAN_COLOUR)
    if config.max_lighting or config.max_saturation or config.max_hue:
        images = _recolour(images, params.colour, config)
    if config.erase:
        fill = constant(MEAN_COLOUR, images.device)[:, None, None]
        images = torch.where(_inside(params.hole, size), fill, images)
    return images.permute(0, 2, 3, 1)


def _centres(size: int, device: torch.device) -> Tensor:
    """Return the centres of `size` pixels that divide [0, 1] equally."""
    return (torch.arange(size, device=device) + 0.5) / size


def _grid(warp: Tensor, size: int, *, projective: bool) -> Tensor:
    """Compute the sampling positions for `grid_sample`: float32 [N, size, size, 2].

    torch's `affine_grid` is not used, because it is slower and its rounding depends on the batch
    size. projective: Whether the warps have a perspective.
    """
    at = _centres(size, warp.device) * 2 - 1
    along = warp[:, :, 0, None, None] * at  # [N, 3, 1, size]
    down = (warp[:, :, 1, None] * at + warp[:, :, 2, None])[..., None]  # [N, 3, size, 1]
    grid = torch.empty(len(warp), size, size, 2, device=warp.device)
    for axis in range(2):
        torch.add(along[:, axis], down[:, axis], out=grid[..., axis])
    if projective:
        grid /= (along[:, 2] + down[:, 2])[..., None]
    return grid


def _recolour(images: Tensor, colour: Tensor, config: AugmentConfig) -> Tensor:
    """Change hue, saturation (relative to grey), contrast (relative to the mean) and brightness.

    Args:
        images: Images, float32 [N, 3, H, W] in 0..255; may be modified in place.
        colour: `AugmentationParams.colour` of each image.
        config: The augmentation options, which say whether hue and saturation change.
    """
    contrast, shift, saturate, cos, sin = colour[:, :, None, None, None].unbind(1)
    if config.max_hue:
        images = _rotate_hue(images, cos, sin)
    # Reduce in two steps, because a single mean over both axes is parallelised differently for
    # different batch sizes, and would round differently.
    means = images.mean(dim=3).mean(dim=2)[..., None, None]  # [N, 3, 1, 1]
    middle = means.mean(dim=1, keepdim=True)
    if config.max_saturation:
        middle = saturate * middle + (1 - saturate) * _grey(means)
        grey = _grey(images).mul_(contrast * (1 - saturate))
        images.mul_(contrast * saturate).add_(grey)
    else:
        images.mul_(contrast)
    return images.add_((1 - contrast) * middle + shift * 255).clamp_(0, 255)


def _rotate_hue(images: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the colours about the grey axis of RGB: float32 [N, 3, H, W] -> [N, 3, H, W].

    This is a linear approximation of the change of hue in HSV, as in NVIDIA DALI's `Hsv`. It takes
    a tenth of the time. A third of a turn equals torchvision's `adjust_hue`. Other angles keep the
    mean of the channels and the distance from grey, while `adjust_hue` keeps the largest and the
    smallest channel. The result may be outside 0..255.

    Args:
        images: Images.
        cos, sin: Cosine and sine of the angle of each image, [N, 1, 1, 1].
    """
    side, turn = (1 - cos) / 3, sin / math.sqrt(3)
    weights = torch.cat([side + cos, side + turn, side - turn], dim=1)  # of red, [N, 3, 1, 1]
    rotated = images[:, :1] * weights
    for channel in (1, 2):
        weights = weights.roll(1, dims=1)
        rotated += images[:, channel, None] * weights
    return rotated


def _grey(images: Tensor) -> Tensor:
    """Compute the luma (grey value) of RGB images: [N, 3, ...] -> [N, 1, ...]."""
    red, green, blue = images[:, :1], images[:, 1:2], images[:, 2:]
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]


def _inside(hole: Tensor, size: int) -> Tensor:
    """Whether the centre of each pixel is in the erased rectangle: bool [N, 1, size, size]."""
    at = _centres(size, hole.device)
    left, top, right, bottom = hole[:, :, None].unbind(1)
    across, down = (left <= at) & (at < right), (top <= at) & (at < bottom)
    return (down[:, :, None] & across[:, None, :])[:, None]
