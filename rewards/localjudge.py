"""`LocalJudge`: a chat model with eyes in this process, from any checkpoint of transformers' image-text-to-text classes.

The probability of an answer is that of its first token right after the chat template's turn to answer (and `Ask.start`), among the
whole vocabulary:

    log p(choice) = logsumexp over the first tokens of its spellings of log_softmax(logits),

each token counted once. What the first token is depends on what stands before it, so it is found by tokenizing the end of the
question with and without the spelling; a spelling that would change the tokens before it cannot follow and is left out.

Models of the Qwen-VL family read tensors (`rewards.qwen`): questions are batched and the probabilities have a gradient with respect
to the pixels. Any other model reads 8-bit pictures by its own processor, one question at a time, without a gradient.

Words are drawn with noise of the ask's own generator, argmax(logits / temperature + Gumbel), so a draw depends on its seed alone
and no global generator is touched. Sampling settings in the checkpoint (top_p, repetition penalty) do not apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .judging import Ask, Judge
from .loading import expand, loading, precision, pretrained
from .preprocess import Quantize
from .qwen import FAMILY, Reader, hidden, render

__all__ = ["LocalJudge"]

CONTEXT = 32  # characters before an answer that decide how it is tokenized
KNOWN = 1024  # remembered tokenizations of answers


class LocalJudge(Judge):
    """A vision-language model of transformers that answers in this process.

    Args:
        model: folder or hub id of a chat model: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision, SmolVLM, InternVL, Gemma 3 ...
        dtype: type the network runs in; probabilities are always float32.
        batch: questions answered at once, for the Qwen-VL family.
        quantize: whether pixels are rounded to 8 bits: "hard" (no gradient), "ste" or "none"; others than Qwen-VL always round.
        fps: frames a second that videos are taken to have.
        min_pixels: smallest area of an image or a frame, for the Qwen-VL family; None as the checkpoint says.
        max_pixels: largest area of an image or a frame, for the Qwen-VL family; None as the checkpoint says.
        attention: transformers' attention implementation, such as "flash_attention_2"; None lets it choose.
        device_map: "auto" spreads a large network over the devices (it then stays where it is); None follows the media.
        trust_remote_code: whether code of the checkpoint's author may run.

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the checkpoint is no chat model.
    """

    def __init__(
        self,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        batch: int = 8,
        quantize: Quantize = "none",
        fps: float = 2.0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        attention: str | None = None,
        device_map: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if batch < 1 or fps <= 0:
            raise ValueError(f"batch must be at least 1 and fps above 0; got {batch} and {fps}")
        from transformers import AutoModelForImageTextToText, AutoProcessor

        trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        options = {"dtype": precision(dtype), "attn_implementation": attention, "device_map": device_map, **trust}
        with loading(model, "the processor: tokenizer, chat template and preprocessor_config.json"):
            self.processor: Any = AutoProcessor.from_pretrained(expand(model), **trust)
        if not getattr(self.processor, "chat_template", None) or not hasattr(self.processor, "image_processor"):
            raise ValueError(
                f"{model!r} has no chat template or no image processor: give a chat model that sees images"
            )
        options = {k: v for k, v in options.items() if v is not None}
        network = pretrained(AutoModelForImageTextToText, model, **options).eval().requires_grad_(False)
        if device_map is None:
            self.network = network
        else:  # out of reach of `.to`
            object.__setattr__(self, "network", network)
        kind = network.config.model_type
        self.batch, self.fps, self.reader = batch, fps, None
        if kind in FAMILY:
            limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
            self.reader = Reader(self.processor, kind, quantize=quantize, fps=fps, **limits)
        elif min_pixels is not None or max_pixels is not None:
            raise ValueError(f"min_pixels and max_pixels need a model of the Qwen-VL family; {model!r} is a {kind}")
        self.differentiable = self.reader is not None and quantize != "hard"
        self.known: dict[tuple[Any, ...], list[list[int]]] = {}

    def odds(self, asks: Sequence[Ask], choices: Sequence[Sequence[str]]) -> Tensor:
        if torch.is_grad_enabled() and not self.differentiable and any(m.requires_grad for a in asks for m in a.media):
            raise RuntimeError(
                f"{self.name} has no gradient here: choose a model of the Qwen-VL family and a quantize other than 'hard'"
            )
        texts = [self.text(ask) for ask in asks]
        tokens = [self.first_tokens(text, choices) for text in texts]
        rows = []
        for start in range(0, len(asks), self.step):
            end = start + self.step
            logits = self.logits(asks[start:end], texts[start:end])
            logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)
            rows.append(together(logp, tokens[start:end]))
        return torch.cat(rows)

    @torch.no_grad()
    def write(self, asks: Sequence[Ask], *, temperature: float = 0.0, max_tokens: int = 512) -> list[str | None]:
        from transformers import GenerationConfig

        own = self.network.generation_config
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        ends = {"eos_token_id": own.eos_token_id, "pad_token_id": self.processor.tokenizer.pad_token_id}
        settings = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, num_beams=1, **plain, **ends)
        texts, answers = [self.text(ask) for ask in asks], []
        for start in range(0, len(asks), self.step):
            chunk = asks[start : start + self.step]
            inputs = self.inputs(chunk, texts[start : start + self.step], "left")
            if self.reader is not None:
                self.network.model.rope_deltas = None  # remembered from the questions before
            draws = [Draws(temperature, [ask.seed for ask in chunk], self.device)] if temperature > 0 else []
            written = self.network.generate(**inputs, generation_config=settings, logits_processor=draws)
            answers += self.processor.tokenizer.batch_decode(
                written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
        return answers

    @property
    def step(self) -> int:
        """Questions answered at once."""
        return self.batch if self.reader else 1

    @property
    def device(self) -> torch.device:
        """Where the network reads its input."""
        return next(self.network.parameters()).device

    def text(self, ask: Ask) -> str:
        """The question as the model reads it, with one placeholder a medium."""
        content: list[dict[str, str]] = []
        for i, part in enumerate(ask.pieces):
            content += [{"type": "text", "text": part}] if part else []
            if i < len(ask.media):
                content += self.places(ask.media[i])
        return render(self.processor, content, ask.system, ask.start)

    def places(self, medium: Tensor) -> list[dict[str, str]]:
        """What stands for a medium in a chat: a model that knows no videos is shown its frames."""
        if medium.ndim not in (3, 4):
            raise ValueError(f"media must be (3,H,W) or (F,3,H,W); got {tuple(medium.shape)}")
        if medium.ndim == 4 and not getattr(self.processor, "video_processor", None):
            return [{"type": "image"}] * len(medium)
        return [{"type": "video" if medium.ndim == 4 else "image"}]

    def first_tokens(self, text: str, choices: Sequence[Sequence[str]]) -> list[list[int]]:
        """Tokens that each choice can begin with after a text."""
        key = text[-CONTEXT:], *map(tuple, choices)
        if key in self.known:
            return self.known[key]

        def ids(text: str) -> list[int]:
            return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

        before, found = ids(key[0]), []
        for choice in choices:
            after = [ids(key[0] + spelling) for spelling in choice]
            found.append(sorted({a[len(before)] for a in after if len(a) > len(before) and a[: len(before)] == before}))
            if not found[-1]:
                raise ValueError(
                    f"none of the spellings {list(choice)} can follow {key[0]!r}: try them with a space before"
                )
        for i, choice in enumerate(choices):
            for j in range(i):
                if shared := set(found[i]) & set(found[j]):
                    token = self.processor.tokenizer.decode([min(shared)])
                    raise ValueError(
                        f"{list(choices[j])} and {list(choice)} begin with the same token {token!r}: spell them apart"
                    )
        if len(self.known) >= KNOWN:
            self.known.clear()
        self.known[key] = found
        return found

    def logits(self, asks: Sequence[Ask], texts: Sequence[str]) -> Tensor:
        """The logits of what comes next: (B, vocabulary)."""
        inputs = self.inputs(asks, texts, "right")
        if self.reader is None:
            return self.network(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        states = hidden(self.network.model, inputs)
        last = inputs["attention_mask"].sum(dim=1) - 1
        return self.network.lm_head(states[torch.arange(len(states), device=states.device), last])

    def inputs(self, asks: Sequence[Ask], texts: Sequence[str], side: Literal["left", "right"]) -> dict[str, Any]:
        """What the network reads."""
        if self.reader is not None:
            return self.reader(texts, [ask.media for ask in asks], side, self.device)
        ((ask,), (text,)) = asks, texts
        images, videos = [], []
        for medium in ask.media:
            stored = (255 * medium.detach().float().clamp(0, 1)).round().byte().cpu()
            whole = medium.ndim == 3 or self.places(medium)[0]["type"] == "image"
            (images if whole else videos).extend(stored if medium.ndim == 4 and whole else [stored])
        options: dict[str, Any] = {"images": images or None}
        if videos:
            options |= {"videos": videos, "videos_kwargs": {"do_sample_frames": False, "fps": self.fps}}
        begun = (bos := self.processor.tokenizer.bos_token) is not None and text.startswith(bos)
        read = self.processor(
            text=[text], return_tensors="pt", text_kwargs={"add_special_tokens": not begun}, **options
        )
        return dict(read.to(self.device, self.network.dtype))


def together(logp: Tensor, tokens: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """(B, vocabulary) log-probabilities, and for each row the tokens of each choice -> (B, C) of the choices."""
    most = max(len(ids) for row in tokens for ids in row)
    padded = torch.tensor([[[*ids, *[-1] * (most - len(ids))] for ids in row] for row in tokens], device=logp.device)
    found = logp.gather(1, padded.clamp(min=0).flatten(1)).view(padded.shape)
    return found.masked_fill(padded < 0, -torch.inf).logsumexp(dim=-1)


class Draws:
    """Makes the most probable word a draw: adds Gumbel noise of each row's own generator to logits / temperature."""

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = [
            torch.empty_like(row).exponential_(generator=g) for row, g in zip(scores, self.generators, strict=True)
        ]
        return scores / self.temperature - torch.stack(noise).log()
