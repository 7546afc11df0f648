"""Random augmentation of batches: a geometric warp, a policy, a colour change, random erasing.

Random parameters are a function of (seed, view, photo), not of the order of batches. A view (one
numbered augmentation) of a photo is therefore always the same picture, and its activations can be
cached. Each option has its own random numbers, so that switching one on does not change the draws
of the others.

Order: crop, flip, perspective, zoom, rotation and shift are combined into one geometric warp. Then
follow the policy (RandAugment or TrivialAugment, see `training.augmentation.policies`), brightness,
contrast and saturation, and erasing.
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
"""ImageNet's mean colour, RGB: fills erased rectangles. About 0 after normalisation."""

ERASED_AREA: Final = (0.02, 0.33)
"""Range of the erased area as a share of the picture, as in torchvision (Zhong et al.: to 0.4)."""
ERASED_RATIO: Final = 10 / 3
"""Largest aspect ratio of the erased rectangle (Zhong et al.)."""

_LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601
_NUMBERS: Final = 24  # uniform random numbers per photo


@dataclass(frozen=True)
class AugmentationParams:
    """Random parameters of N photos.

    Attributes:
        warp: float32 [N, 3, 3], homography from output square to photo, both in [-1, 1].
        colour: float32 [N, 3]: contrast factor, brightness shift as a share of the full range,
            saturation factor.
        hole: float32 [N, 4]: left, top, right, bottom of the erased rectangle as shares of the
            side; all 0 if nothing is erased.
        seed: int64 [N], for the policy.
    """

    warp: Tensor
    colour: Tensor
    hole: Tensor
    seed: Tensor

    def __len__(self) -> int:
        """Number of photos."""
        return len(self.seed)

    def __getitem__(self, index: Tensor | slice) -> AugmentationParams:
        """The parameters of some of the photos."""
        return AugmentationParams(
            self.warp[index], self.colour[index], self.hole[index], self.seed[index]
        )

    def to(self, device: torch.device) -> AugmentationParams:
        """A copy on another device."""
        parts = (self.warp, self.colour, self.hole, self.seed)
        return AugmentationParams(*(upload(part, device) for part in parts))


def draw(
    config: AugmentConfig, aspect: Tensor, seed: int, view: int, *, crop: float = 1.0
) -> AugmentationParams:
    """Draw the parameters of one view of every photo.

    Args:
        config: Ranges of the parameters.
        aspect: float32 [N], width / height. Row i of the result depends on `aspect[i]` and i, not
            on the other photos.
        seed, view: Select the draw; both at least 0.
        crop: `Preprocess.crop`; with `config.crop = "center"` it multiplies the side of the crop,
            so that a view without random changes is the validation picture.
    """
    numbers = np.random.default_rng([seed, view]).random((len(aspect), _NUMBERS))
    u = list(torch.from_numpy(numbers).T)  # [0, 1); each option below has its own columns
    s = [2 * column - 1 for column in u]  # [-1, 1)
    colour = torch.stack(
        [
            1 + s[10] * config.max_lighting,
            s[11] * config.max_lighting,
            1 + s[12] * config.max_saturation,
        ],
        dim=1,
    )
    return AugmentationParams(
        _warp(config, aspect.double(), u, s, crop).float(),
        colour.float(),
        _hole(config.erase, *u[13:18]).float(),
        (u[18] * 2**31).long(),
    )


def _warp(
    config: AugmentConfig, aspect: Tensor, u: list[Tensor], s: list[Tensor], crop: float
) -> Tensor:
    """Homographies, float64 [N, 3, 3]; lengths in units of the photo's short side."""
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
    count = {"none": 1, "horizontal": 2, "dihedral": 8}[config.flip]
    return warp @ _SYMMETRIES[(u[5] * count).long()]


def _rows(*rows: list[Tensor]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _symmetries() -> Tensor:
    """The 8 symmetries of the square, float64 [8, 3, 3]: first identity, then horizontal flip."""
    matrices = torch.zeros(8, 3, 3, dtype=torch.float64)
    for i in range(8):
        x, y = (1 - 2 * (i & 1), 1 - (i & 2))
        matrices[i] = torch.diag(torch.tensor([x, y, 1.0], dtype=torch.float64))
        if i & 4:
            matrices[i] = matrices[i][[1, 0, 2]]
    return matrices


_SYMMETRIES: Final = _symmetries()


def _tilt(shrink: Tensor) -> Tensor:
    """Homographies [N, 3, 3] into the square, for a perspective from its left or right.

    shrink: [N], the share by which the far edge is shorter than the near edge. If it is positive,
    the far edge is on the right.
    """
    p = shrink / (2 - shrink.abs())
    zero, one = torch.zeros_like(p), torch.ones_like(p)
    return _rows([one, zero, p], [zero, 1 - p.abs(), zero], [p, zero, one])


def _hole(
    probability: float, chance: Tensor, area: Tensor, ratio: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """Rectangles of "Random Erasing" (Zhong et al., 2020) from uniform numbers: float64 [N, 4].

    The aspect ratio is log-uniform within the range that fits into the picture.
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
    """Augment a batch: uint8 [N, S, S, 3] -> float32 [N, size, size, 3] in 0..255.

    On the CPU the result for a photo does not depend on the batch, bit for bit.

    Args:
        pixels: Whole photos resized to squares; the warp restores their aspect ratios.
        params: Parameters of these photos, on the device of `pixels`.
        config: The configuration that `params` was drawn with.
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
    if config.max_lighting or config.max_saturation:
        images = _recolour(images, params.colour, saturation=config.max_saturation > 0)
    if config.erase:
        fill = constant(MEAN_COLOUR, images.device)[:, None, None]
        images = torch.where(_inside(params.hole, size), fill, images)
    return images.permute(0, 2, 3, 1)


def _centres(size: int, device: torch.device) -> Tensor:
    """Centres of `size` pixels in [0, 1]."""
    return (torch.arange(size, device=device) + 0.5) / size


def _grid(warp: Tensor, size: int, *, projective: bool) -> Tensor:
    """Sampling positions of each output pixel: float32 [N, size, size, 2].

    Replaces `affine_grid`, whose matrix product is slower and rounds differently for different
    batch sizes.
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


def _recolour(images: Tensor, colour: Tensor, *, saturation: bool) -> Tensor:
    """Change saturation (around each pixel's grey), contrast (around the mean) and brightness.

    images: float32 [N, 3, H, W] in 0..255; modified in place and returned.
    """
    contrast, shift, saturate = colour[:, :, None, None, None].unbind(1)
    # Reduce in two steps, because a single mean over both axes is parallelised differently for
    # different batch sizes, and would round differently.
    means = images.mean(dim=3).mean(dim=2)[..., None, None]  # [N, 3, 1, 1]
    middle = means.mean(dim=1, keepdim=True)
    if saturation:
        middle = saturate * middle + (1 - saturate) * _grey(means)
        grey = _grey(images).mul_(contrast * (1 - saturate))
        images.mul_(contrast * saturate).add_(grey)
    else:
        images.mul_(contrast)
    return images.add_((1 - contrast) * middle + shift * 255).clamp_(0, 255)


def _grey(images: Tensor) -> Tensor:
    """Luma: [N, 3, ...] -> [N, 1, ...]."""
    red, green, blue = images[:, :1], images[:, 1:2], images[:, 2:]
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]


def _inside(hole: Tensor, size: int) -> Tensor:
    """Whether the centre of each pixel is in the hole: bool [N, 1, size, size]."""
    at = _centres(size, hole.device)
    left, top, right, bottom = hole[:, :, None].unbind(1)
    across, down = (left <= at) & (at < right), (top <= at) & (at < bottom)
    return (down[:, :, None] & across[:, None, :])[:, None]
