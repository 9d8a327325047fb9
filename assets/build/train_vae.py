"""Trains the autoencoder, whitens its latents, and writes work/vae (diffusers layout) and work/latents.pt.

Loss: L1 + squared error on pixels in [-1,1] + 1e-4 KL a latent value. Each latent channel is then shifted and scaled to mean
0 and variance 1 over the training scenes; the affine map is folded into `quant_conv` and `post_quant_conv`, so the
pipeline's scalar scaling factor is 1.
"""

from __future__ import annotations

import torch
from common import SIZE, WORK, Run, arguments, autocast, grid
from diffusers import AutoencoderKL

CONFIG = dict(
    block_out_channels=(16, 32, 64),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=SIZE,
    scaling_factor=1.0,
)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1], channels last."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def moments(vae: AutoencoderKL, images: torch.Tensor, batch: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior means and standard deviations of many uint8 images."""
    parts = []
    for chunk in images.split(batch):
        with autocast():
            posterior = vae.encode(pixels(chunk)).latent_dist
        parts.append((posterior.mean.float(), posterior.std.float()))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Folds the channel statistics of the posterior samples into the 1x1 convolutions around the latent."""
    mean, std = moments(vae, images)
    shift = mean.mean((0, 2, 3))
    scale = (mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt()
    c = len(shift)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.bias[:c] = (quant.bias[:c] - shift) / scale
    quant.weight[:c] /= scale[:, None, None, None]
    quant.bias[c:] -= 2 * scale.log()  # the second half is log-variance
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight *= scale[None, :, None, None]


def main() -> None:
    args = arguments(__doc__, minutes=8, seed=11, batch=32, lr=2e-3)
    images = torch.load(WORK / "scenes.pt", weights_only=False)["images"]
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    print(sum(p.numel() for p in vae.parameters()), "parameters")
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=1e-4)
    run = Run("vae", args, optimizer, {"vae": vae})
    for step in run:
        clean = pixels(images[torch.randint(len(images), (args.batch,), generator=run.generator)])
        with autocast():
            posterior = vae.encode(clean).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=run.generator)
            latent = posterior.mean.float() + posterior.std.float() * noise
            output = vae.decode(latent).sample
        error = output.float() - clean
        mse, kl = error.square().mean(), posterior.kl().mean() / noise[0].numel()
        loss = error.abs().mean() + mse + 1e-4 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            run.log(mse=mse.item(), kl=kl.item(), std=posterior.std.mean().item())
            grid(torch.cat([clean[:16], output.detach()[:16]]) / 2 + 0.5, WORK / "vae.png")
    whiten(vae, images[:4000])
    vae.save_pretrained(WORK / "vae")
    mean, std = moments(vae, images)
    torch.save({"mean": mean.half(), "std": std.half()}, WORK / "latents.pt")
    print("whitened:", mean.mean((0, 2, 3)), mean.std((0, 2, 3)), std.mean((0, 2, 3)))


if __name__ == "__main__":
    main()
