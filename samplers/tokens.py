"""Texts longer than an encoder reads: what a tokenizer's limit cuts off is named, once a text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["told_of_cuts"]

logger = logging.getLogger("kilter")


class Watched:
    """A tokenizer that remembers what it cut off: `cuts` holds (limit, text) of every call that could cut."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.cuts: list[tuple[int, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Pipelines set the tokenizer's own `padding_side`."""
        if name in ("inner", "cuts"):
            super().__setattr__(name, value)
        else:
            setattr(self.inner, name, value)

    def __len__(self) -> int:
        return len(self.inner)

    def __call__(self, text: Any = None, *args: Any, **how: Any) -> Any:
        if how.get("truncation"):
            self.cuts.append(self._cut(text, how))
        return self.inner(text, *args, **how)

    def apply_chat_template(self, *args: Any, **how: Any) -> Any:
        return type(self.inner).apply_chat_template(self, *args, **how)  # which calls this, not the tokenizer

    def _cut(self, text: Any, how: dict[str, Any]) -> tuple[int, str]:
        limit = how.get("max_length") or self.inner.model_max_length
        ids = self.inner(text, add_special_tokens=how.get("add_special_tokens", True)).input_ids
        ids = ids[0] if ids and isinstance(ids[0], list) else ids
        special = set(self.inner.all_special_ids)
        ends = next((i for i, token in enumerate(reversed(ids)) if token not in special), 0)
        cut = ids[limit - ends :] if len(ids) > limit else []
        return limit, self.inner.decode(cut, skip_special_tokens=True).strip()


@contextmanager
def told_of_cuts(pipe: Any, text: str) -> Iterator[None]:
    """Warns if every tokenizer that reads `text` meanwhile cuts it, in place of the pipeline's own warnings."""
    from diffusers.utils import logging as diffusers_log
    from transformers import PreTrainedTokenizerBase, ProcessorMixin
    from transformers.utils import logging as transformers_log

    levels = [(log, log.get_verbosity()) for log in (diffusers_log, transformers_log)]
    holders = [vars(pipe), *(vars(part) for part in vars(pipe).values() if isinstance(part, ProcessorMixin))]
    before = [(h, name, part) for h in holders for name, part in h.items() if isinstance(part, PreTrainedTokenizerBase)]
    words = [Watched(part) for _, _, part in before]
    try:
        for log, _ in levels:
            log.set_verbosity_error()
        for (holder, name, _), one in zip(before, words, strict=True):
            holder[name] = one
        yield
    finally:
        for holder, name, part in before:
            holder[name] = part
        for log, level in levels:
            log.set_verbosity(level)
    cuts = [cut for one in words for cut in one.cuts]
    if cuts and all(left for _, left in cuts):
        limit, left = max(cuts)
        logger.warning(
            "the model reads %d tokens of %r and leaves out %r: shorten it", limit, _brief(text), _brief(left)
        )


def _brief(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
