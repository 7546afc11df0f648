"""Random changes to training photos, a whole batch at a time: one warp, one colour change, a hole.

Every draw is a function of (seed, view, photo), never of the order of batches: the same view of a
photo is the same picture whenever it is asked for, which is what lets its activations be cached.
Each option has random numbers of its own, so switching one on leaves the others' draws as they are.

Order: crop, flip, perspective, zoom, rotation and shift are one warp of one resampling; then the
policy (`training.augmentation.policies`), brightness, contrast and saturation, and erasing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.augmentation import policies
from training.config.sections import AugmentConfig
from training.utils.device import constant, upload

MEAN_COLOUR: Final = (124, 116, 104)
"""ImageNet's, in RGB: what an erased rectangle is filled with. Normalised, it is about 0."""

ERASED_AREA: Final = (0.02, 0.33)
"""Area of the erased rectangle as a share of the picture: torchvision's (Zhong et al.: to 0.4)."""
ERASED_RATIO: Final = 10 / 3
"""Its longest stretch (Zhong et al.)."""

_LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601
_NUMBERS: Final = 24  # uniform random numbers that a photo gets


@dataclass(frozen=True)
class AugmentationParams:
    """What is done to each of N photos.

    warp: float32 [N, 3, 3], a homography, output square -> photo, both in [-1, 1] coordinates.
    colour: float32 [N, 3], contrast factor, brightness shift as a share of the full range, and
        saturation factor.
    hole: float32 [N, 4], left, top, right and bottom as shares of the side; all 0 for no hole.
    seed: int64 [N], of the policy's own random choices.
    """

    warp: Tensor
    colour: Tensor
    hole: Tensor
    seed: Tensor

    def __len__(self) -> int:
        """How many photos."""
        return len(self.seed)

    def __getitem__(self, index: Tensor | slice) -> AugmentationParams:
        """The draws of some of the photos."""
        return AugmentationParams(
            self.warp[index], self.colour[index], self.hole[index], self.seed[index]
        )

    def to(self, device: torch.device) -> AugmentationParams:
        """The same on another device."""
        parts = (self.warp, self.colour, self.hole, self.seed)
        return AugmentationParams(*(upload(part, device) for part in parts))


def draw(
    config: AugmentConfig, aspect: Tensor, seed: int, view: int, *, crop: float = 1.0
) -> AugmentationParams:
    """Draw one view of every photo.

    Args:
        config: Ranges.
        aspect: float32 [N], width over height.
        seed, view: Which draw, both at least 0. A photo's draw depends on its place in `aspect` and
            on nothing else of the others.
        crop: `Preprocess.crop`; with `config.crop = "center"` the crop is this share of what
            `config.scale` says, so that an unchanged view is the validation picture.
    """
    numbers = np.random.default_rng([seed, view]).random((len(aspect), _NUMBERS))
    u = list(torch.from_numpy(numbers).T)  # [0, 1); each use below has columns of its own
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
    """float64 [N, 3, 3]; lengths are in units of the photo's short side."""
    low, high = config.scale
    closer = 1 + u[6] * (config.max_zoom - 1)
    side = torch.sqrt(low + u[0] * (high - low)) / closer
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
    """The 8 symmetries of the square, float64 [8, 3, 3]; the first 2 are none and left to right."""
    matrices = torch.zeros(8, 3, 3, dtype=torch.float64)
    for i in range(8):
        x, y = (1 - 2 * (i & 1), 1 - (i & 2))
        matrices[i] = torch.diag(torch.tensor([x, y, 1.0], dtype=torch.float64))
        if i & 4:
            matrices[i] = matrices[i][[1, 0, 2]]
    return matrices


_SYMMETRIES: Final = _symmetries()


def _tilt(less: Tensor) -> Tensor:
    """Look at the square from its left or right: a homography into the square.

    less: [N], how much shorter than the near edge the far edge is, as a share; positive has the far
    edge on the right.
    """
    p = less / (2 - less.abs())
    zero, one = torch.zeros_like(p), torch.ones_like(p)
    return _rows([one, zero, p], [zero, 1 - p.abs(), zero], [p, zero, one])


def _hole(
    probability: float, chance: Tensor, area: Tensor, ratio: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """Where "Random Erasing" erases (Zhong et al., 2020), from uniform numbers: float64 [N, 4].

    The ratio of its sides is spread evenly over its logarithm, and only as far as it fits.
    """
    low, high = ERASED_AREA
    area = low + area * (high - low)
    widest = torch.log((1 / area).clamp(max=ERASED_RATIO))
    stretch = torch.exp((2 * ratio - 1) * widest / 2)
    width, height = area.sqrt() * stretch, area.sqrt() / stretch
    left, top = x * (1 - width), y * (1 - height)
    hole = torch.stack([left, top, left + width, top + height], dim=1)
    return hole * (chance < probability)[:, None]


def apply(pixels: Tensor, draws: AugmentationParams, config: AugmentConfig, size: int) -> Tensor:
    """Change a batch: uint8 [N, S, S, 3] -> float32 [N, size, size, 3] in 0..255.

    On the CPU a photo comes out the same, bit for bit, whatever batch it is in.

    Args:
        pixels: Whole photos, squeezed to a square; the warp undoes the squeeze.
        draws: Of these photos, on the device of `pixels`.
        config: As the draws were drawn with.
        size: Side of the result in pixels.
    """
    images = pixels.permute(0, 3, 1, 2).float()
    grid = _grid(draws.warp, size, projective=config.max_warp > 0)
    # Rotation looks past the edge; a mirrored edge is a picture, a black corner is a clue.
    cut = F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    if config.policy != "none":
        cut = policies.run(cut, draws.seed, config, fill=MEAN_COLOUR)
    if config.max_lighting or config.max_saturation:
        cut = _recolour(cut, draws.colour, saturation=config.max_saturation > 0)
    if config.erase:
        fill = constant(MEAN_COLOUR, cut.device)[:, None, None]
        cut = torch.where(_inside(draws.hole, size), fill, cut)
    return cut.permute(0, 2, 3, 1)


def _centres(size: int, device: torch.device) -> Tensor:
    """Middles of `size` pixels between 0 and 1."""
    return (torch.arange(size, device=device) + 0.5) / size


def _grid(warp: Tensor, size: int, *, projective: bool) -> Tensor:
    """Where each pixel of the result looks: float32 [N, size, size, 2].

    As `affine_grid`, whose matrix product is slower and rounds differently in other batches.
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
    """Saturation about each pixel's grey, contrast about the photo's mean, brightness; in place.

    images: float32 [N, 3, H, W] in 0..255, as is what comes back.
    """
    contrast, shift, saturate = colour[:, :, None, None, None].unbind(1)
    # In two steps, of which none is split among threads in one batch and not in another.
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
    """[N, 3, ...] -> [N, 1, ...]."""
    red, green, blue = images[:, :1], images[:, 1:2], images[:, 2:]
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]


def _inside(hole: Tensor, size: int) -> Tensor:
    """Which pixels have their middle in the hole: bool [N, 1, size, size]."""
    at = _centres(size, hole.device)
    left, top, right, bottom = hole[:, :, None].unbind(1)
    across, down = (left <= at) & (at < right), (top <= at) & (at < bottom)
    return (down[:, :, None] & across[:, None, :])[:, None]
