"""Tiny random instances of the real model classes, saved in the hub layout, and rewards with closed forms."""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from rewards import Reward
from samplers import Cond, Levels, Policy
from tests.oracles import masked_table

torch.set_num_threads(1)


class Linear(Reward):
    """r(x) = a·x summed over the state: exact tilts exist for Gaussian data."""

    needs_prompt = False

    def __init__(self, a: float = 1.0) -> None:
        super().__init__()
        self.a = a

    def check(self, media):
        pass

    def measure(self, media, prompts):
        return self.a * media.flatten(1).sum(1)


class Quadratic(Linear):
    """r(x) = −a·|x − b|²."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__(a)
        self.b = b

    def measure(self, media, prompts):
        return -self.a * (media - self.b).square().flatten(1).sum(1)


class Faint(Reward):
    """Mean brightness, in units so large that its gradient is tiny."""

    needs_prompt = False

    def measure(self, media, prompts):
        return 1e-4 * media.mean((1, 2, 3))


class TokenReward(Linear):
    """A table lookup over token strings."""

    differentiable = False

    def __init__(self, table: dict[tuple[int, ...], float]) -> None:
        super().__init__()
        self.table = table

    def measure(self, media, prompts):
        return torch.tensor([self.table[tuple(row)] for row in media.tolist()], dtype=torch.float64)


class Table(Policy):
    """Masked diffusion over a few tokens, with one table of clean-token odds a state; see `masked_table`."""

    prediction = "logits"

    def __init__(self, length=3, symbols=3, seed=0):
        super().__init__()
        self.network, self.length = torch.nn.Linear(1, 1), length
        self.table = masked_table(length, symbols, seed)

    def encode(self, prompts):
        return Cond({"row": torch.zeros(len(prompts), 1)})

    def shape(self, size):
        return (self.length,)

    def levels(self, steps, size=()):
        alpha = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return Levels(1 - alpha, alpha, 1 - alpha)

    def predict(self, x, at, cond):
        return self.table[tuple(x.T)].log()

    def decode(self, x0, frames=None):
        return x0


def z_score(values, expected):
    """How many standard errors the mean of `values` is from `expected`."""
    return float((values.mean() - expected) / (values.std() / len(values) ** 0.5))


@contextlib.contextmanager
def saved_bytes():
    """Counts what autograd keeps for the backward pass."""
    kept: list[int] = []

    def keep(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def save_tokenizer(folder):
    """A CLIP tokenizer whose vocabulary is single characters."""
    import json

    from transformers import CLIPTokenizer

    characters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = characters + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def build_pipeline(
    folder, *, scheduler=None, guidance_embedding: bool = False, pipeline: str = "StableDiffusionPipeline"
):
    """A random StableDiffusion pipeline of the real classes, small enough for a test, ready to be saved."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = save_tokenizer(folder / "words")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=8,
            time_cond_proj_dim=8 if guidance_embedding else None,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            latent_channels=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        )
    scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    return getattr(diffusers, pipeline)(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random StableDiffusion model on disk, in the hub layout."""
    folder = tmp_path_factory.mktemp("tiny-random-sd")
    build_pipeline(folder).save_pretrained(folder / "model")
    return folder / "model"
