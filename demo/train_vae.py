"""Train the demo VAE: ComfyUI's TAESD class with 16 latent channels, on crops of the scenes.

The networks trained here are narrower than TAESD's fixed width of 64 and leave out some of its residual
blocks. On export they are embedded in the full width: absent channels and blocks become zeros, which a
ReLU network passes through unchanged. The latents come out with about unit variance once ComfyUI has
applied Flux's latent scale and shift.

    python train_vae.py --comfyui PATH --out vae.safetensors --minutes 15
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from scenes import make_scene

LATENT_CHANNELS = 16
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159
TAESD_WIDTH = 64


class _Block(nn.Module):
    """TAESD's residual block. ``present=False``: what is left of it when its convolutions are zero."""

    def __init__(self, width: int, present: bool) -> None:
        super().__init__()
        self.present = present
        if present:
            layers = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
            self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x):
        return F.relu(self.conv(x) + x if self.present else x)


def _blocks(width: int, present: int, total: int) -> list[nn.Module]:
    return [_Block(width, i < present) for i in range(total)]


def build_encoder(width: int = 24) -> nn.Sequential:
    def down():
        return nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)

    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        *_blocks(width, 0, 1),
        *[down(), *_blocks(width, 1, 3)],
        *[down(), *_blocks(width, 1, 3)],
        *[down(), *_blocks(width, 3, 3)],
        nn.Conv2d(width, LATENT_CHANNELS, 3, padding=1),
    )


class _Clamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


def build_decoder(width: int = 40) -> nn.Sequential:
    def up():
        return [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]

    return nn.Sequential(
        *[_Clamp(), nn.Conv2d(LATENT_CHANNELS, width, 3, padding=1), nn.ReLU()],
        *[*_blocks(width, 3, 3), *up()],
        *[*_blocks(width, 3, 3), *up()],
        *[*_blocks(width, 2, 3), *up()],
        *[*_blocks(width, 0, 1), nn.Conv2d(width, 3, 3, padding=1)],
    )


def taesd_state_dict(encoder: nn.Module, decoder: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that ComfyUI's TAESD loads, in fp16."""
    from comfy.taesd.taesd import TAESD

    full = {k: torch.zeros_like(v) for k, v in TAESD(latent_channels=LATENT_CHANNELS).state_dict().items()}
    for prefix, network in (("taesd_encoder.", encoder), ("taesd_decoder.", decoder)):
        for key, value in network.state_dict().items():
            full[prefix + key][tuple(slice(0, n) for n in value.shape)] = value
    full["vae_scale"], full["vae_shift"] = torch.tensor(FLUX_SCALE), torch.tensor(FLUX_SHIFT)
    return {k: v.half().contiguous() if v.ndim else v.float() for k, v in full.items()}


def _crops(rng: torch.Generator, batch: int, size: int) -> torch.Tensor:
    crops = []
    for _ in range(batch // 4):
        seed = int(torch.randint(1_000_000, (), generator=rng))
        image = torch.from_numpy(make_scene(seed).image.copy()).permute(2, 0, 1).float() / 255
        for _ in range(4):
            y, x = (int(torch.randint(image.shape[1] - size, (), generator=rng)) for _ in range(2))
            crops.append(image[:, y : y + size, x : x + size])
    return torch.stack(crops).to(memory_format=torch.channels_last)


def _edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.path.insert(0, str(args.comfyui))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from safetensors.torch import save_file

    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    encoder = build_encoder().to(memory_format=torch.channels_last)
    decoder = build_decoder().to(memory_format=torch.channels_last)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=1e-4, betas=(0.9, 0.98))
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 50) * max(0.02, 1 - done)
        x = _crops(rng, args.batch, 96)
        with torch.autocast("cpu", torch.bfloat16):
            z = encoder(x).float()
            y = decoder(z + 0.1 * torch.randn_like(z)).float()
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        latent = mean.square().mean() + (std - 1).square().mean()
        edge = sum(F.l1_loss(a, b) for a, b in zip(_edges(y), _edges(x), strict=True))
        loss = F.l1_loss(y, x) + 0.5 * edge + F.mse_loss(y, x) + 0.05 * latent
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            psnr = -10 * F.mse_loss(y.detach().clamp(0, 1), x).log10()
            print(
                f"{step:5d} {done:4.0%} loss {loss:.4f} psnr {psnr:.2f} latent std {std.mean():.2f}",
                flush=True,
            )
        if step % 500 == 0:
            save_file(taesd_state_dict(encoder, decoder), args.out)
    save_file(taesd_state_dict(encoder, decoder), args.out)


if __name__ == "__main__":
    main()
