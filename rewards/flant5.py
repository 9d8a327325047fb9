"""VQAScore by its own judge, CLIP-FlanT5: a FlanT5 that sees an image through a CLIP and two linear layers.

The image, padded to a square with the mean colour, becomes the patch embeddings of CLIP's last layer but one; projected, they stand
in the middle of the question that the encoder reads. The score is the geometric mean of the probabilities of the two tokens of the
answer, "Yes" and the end,

    score = exp((log p(Yes) + log p(end | Yes)) / 2) = sqrt(p(Yes) p(end | Yes)),

since the released code averages the cross-entropy over them. `parts` holds p(Yes) alone.

Source: Lin et al., "Evaluating Text-to-Visual Generation with Image-to-Text Generation", 2024, arXiv 2404.01291; question
(`questions/vqascore.json`) and layout of the released code. As there, the text before the image ends in an end-of-text token of its
own, and probabilities are among the tokens that the tokenizer knows, not among the padded rows of the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import Prompt, Reward, Scores
from .judging import published
from .loading import expand, fill, folder, loading, precision, pretrained, pretrained_tokenizer, read_model, warn_if_cut
from .preprocess import Preprocess, Quantize

__all__ = ["CLIPFlanT5"]

LIMIT = 2048  # tokens behind the image
LEFT_OVER = [r"embed_tokens\.weight", r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"]
Weights = Mapping[str, Tensor]


class CLIPFlanT5(Reward):
    """VQAScore by CLIP-FlanT5, its published judge (Lin et al. 2024, arXiv 2404.01291).

    Range: 0 to 1
    Size: 336, padded to a square with the mean colour
    Gradient: unless `quantize` is "hard"
    Weights: zhiqiulin/clip-flant5-xxl (11 billion), zhiqiulin/clip-flant5-xl (3 billion)
    Licence: Apache-2.0 (code, FlanT5), MIT (CLIP)

    Follows compositional prompts, counts and relations far better than CLIP's cosine. `VQAScore` asks any other judge.

    Args:
        model: folder or hub id of the weights.
        tokenizer: folder or hub id of FlanT5's tokenizer.
        tower: folder or hub id of the CLIP, of which the config is read, and the weights if `model` lacks them.
        dtype: type the networks run in; the score is always float32.
        quantize: whether pixels are rounded to 8 bits as published: "hard" (no gradient), "ste" or "none".

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the weights have another layout.
    """

    def __init__(
        self,
        model: str = "zhiqiulin/clip-flant5-xl",
        tokenizer: str = "google/flan-t5-xl",
        tower: str = "openai/clip-vit-large-patch14-336",
        *,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__()
        kind = precision(dtype, ("float32", "bfloat16"))  # float16 overflows in a T5
        self.tokenizer = pretrained_tokenizer(tokenizer)
        weights = read_model(model)
        with loading(model, "config.json of a CLIP-FlanT5"):
            config = json.loads((folder(model, "config.json") / "config.json").read_text())
        self.language: Any = language(config, weights, model).to(kind)
        self.tower: Any = vision(tower, weights, model).to(kind)
        self.projector: Any = projector(weights, self.tower.config.hidden_size, self.language.config.d_model, model).to(
            kind
        )
        self.layer: int = config.get("mm_vision_select_layer", -2)
        self.preprocess = Preprocess("expand2square", self.tower.config.image_size, quantize=quantize)
        self.differentiable = self.preprocess.differentiable
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        states, mask = self.question(media, prompts)
        answer = torch.tensor(self.tokenizer("Yes")["input_ids"], device=media.device).expand(len(media), -1)
        start = answer.new_full((len(media), 1), self.language.config.decoder_start_token_id)
        given = torch.cat([start, answer[:, :-1]], dim=1)
        logits = self.language(
            inputs_embeds=states, attention_mask=mask, decoder_input_ids=given, use_cache=False
        ).logits
        logits = logits[..., : len(self.tokenizer)]
        logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)
        logp = logp.gather(2, answer[..., None]).squeeze(2)
        return Scores(logp.mean(dim=1).exp(), {"yes": logp[:, 0].exp()})

    def question(self, media: Tensor, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """What the encoder reads, (B, L, D), and its mask: text, image, text."""
        pixels = self.preprocess(media).to(next(self.tower.parameters()).dtype)
        seen = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[self.layer][:, 1:]
        before, after = published("vqascore", "flant5_chat").split("<media>")
        after = after.replace("{question}", published("vqascore", "flant5"))
        asked = [after.replace("{prompt}", prompt.text) for prompt in prompts]
        for prompt, ids in zip(prompts, self.tokenizer(asked, verbose=False)["input_ids"], strict=True):
            warn_if_cut(self.name, prompt.text, len(ids), LIMIT)
        last = self.tokenizer(asked, padding=True, truncation=True, max_length=LIMIT, return_tensors="pt").to(
            media.device
        )
        first = self.tokenizer([before] * len(media), return_tensors="pt").to(media.device)
        embed = self.language.get_input_embeddings()
        states = torch.cat([embed(first["input_ids"]), self.projector(seen), embed(last["input_ids"])], dim=1)
        ahead = first["attention_mask"].new_ones(seen.shape[:2])
        return states, torch.cat([first["attention_mask"], ahead, last["attention_mask"]], dim=1)


def language(config: Mapping[str, Any], weights: Weights, name: str) -> nn.Module:
    """The FlanT5 in a checkpoint."""
    from accelerate import init_empty_weights
    from transformers import T5Config, T5ForConditionalGeneration

    with init_empty_weights(include_buffers=False):
        network = T5ForConditionalGeneration(T5Config.from_dict({**config, "model_type": "t5"}))
    own = {k: v for k, v in weights.items() if not k.startswith(("vision_tower.", "mm_projector."))}
    for half in ("encoder", "decoder"):  # one matrix, which files hold once or three times
        if "shared.weight" in own:
            own.setdefault(f"{half}.embed_tokens.weight", own["shared.weight"])
    fill(network, own, name, ignore=LEFT_OVER)
    return network


def vision(tower: str, weights: Weights, name: str) -> nn.Module:
    """The CLIP: that of the checkpoint, or else the published one."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    prefix = "vision_tower.vision_tower."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if not own:
        return pretrained(CLIPVisionModel, tower)
    with loading(tower, "config.json of a CLIP"):
        network = CLIPVisionModel(CLIPVisionConfig.from_pretrained(expand(tower)))
    if not any(k.startswith("vision_model.") for k in network.state_dict()):  # since transformers 5.3
        own = {k.removeprefix("vision_model."): v for k, v in own.items()}
    fill(network, own, name, ignore=[r".*position_ids"])
    return network


def projector(weights: Weights, read: int, written: int, name: str) -> nn.Sequential:
    """The two layers between CLIP and FlanT5."""
    layers = nn.Sequential(nn.Linear(read, written), nn.GELU(), nn.Linear(written, written))
    prefix = "mm_projector."
    fill(layers, {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, name)
    return layers
