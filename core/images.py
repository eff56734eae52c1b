"""What an IMAGE has to be before anything is made of it."""

from __future__ import annotations

import torch
from torch import Tensor

_NEEDED = (
    "This IMAGE cannot be used: it has the shape {}, where (images, height, width, channels) is needed, with "
    "at least one image, one pixel, and the 3 channels of RGB or 4 of RGBA. "
)


def rgb_images(images: Tensor) -> Tensor:
    """The colours (N, H, W, 3) of an IMAGE (N, H, W, 3 or more), which may have an alpha channel behind them.

    Raises:
        ValueError: there are no images, pixels or colours, or some of their values are NaN or infinite.
    """
    shape = tuple(images.shape)
    if len(shape) != 4 or 0 in shape:
        raise ValueError(_NEEDED.format(shape) + "Look at what the node gives that it comes from.")
    if shape[3] < 3:
        raise ValueError(
            _NEEDED.format(shape)
            + "Grey becomes RGB with Convert Image to Mask (red) and Convert Mask to Image."
        )
    colours = images[..., :3]
    # By the lowest and highest value, both NaN if any is: asking each whether it is finite takes far longer.
    broken = [i for i, image in enumerate(colours) if not torch.stack(image.aminmax()).isfinite().all()]
    if broken:
        raise ValueError(
            f"This IMAGE cannot be used: {len(broken)} of its {len(colours)} images have NaN or infinite "
            f"values, first image {broken[0] + 1}. The VAE or the model computed them: try the "
            "VAE in full precision (start ComfyUI with --fp32-vae), or another weight_dtype of the model."
        )
    return colours
