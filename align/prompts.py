"""Prompts as they are given: texts, or files of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rewards import Prompt

__all__ = ["given_prompts", "read_prompts", "world_prompts"]

WORLDS = Path(__file__).resolve().parent.parent / "assets" / "prompts"


def read_prompts(given: Sequence[str]) -> list[Prompt]:
    """Prompts as given, or from .txt (one a line) and .jsonl files (rows with "prompt", optional "negative", the rest is meta;
    "control" names a picture for a ControlNet, from where the file lies).

    Raises:
        ValueError: nothing given, or a row that is not a prompt.
        FileNotFoundError: no such file.
    """
    prompts: list[Prompt] = []
    for item in given:
        path = Path(item)
        if path.suffix.lower() in (".txt", ".jsonl") and (path.is_file() or not any(c.isspace() for c in item)):
            prompts += _prompt_file(path)
        elif len(item) < 256 and path.is_file():
            raise ValueError(f"prompt files are .txt (one a line) or .jsonl; got {item}")
        else:
            prompts.append(Prompt(item))
    if not prompts:
        raise ValueError("no prompts: pass at least one, or a .txt or .jsonl file that holds some")
    return prompts


def given_prompts(prompts: Sequence[str | Prompt] | str | Prompt) -> list[Prompt]:
    """Prompts, texts and files of them, as one list; empty if nothing is given."""
    given = [prompts] if isinstance(prompts, (str, Path, Prompt)) else list(prompts)
    texts = [p for p in given if not isinstance(p, Prompt)]
    return [p for p in given if isinstance(p, Prompt)] + (read_prompts(texts) if texts else [])


def world_prompts(world: str, split: str) -> list[Prompt]:
    """The prompts that come with an embedded world: its "train" or "heldout" ones; none for other models."""
    path = WORLDS / f"{split}.jsonl"
    return _prompt_file(path) if world == "shapes" and path.is_file() else []


def _prompt_file(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}")
    lines = [
        (i, line.strip()) for i, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1) if line.strip()
    ]
    return [_prompt_row(path, i, line) if path.suffix.lower() == ".jsonl" else Prompt(line) for i, line in lines]


def _prompt_row(path: Path, number: int, line: str) -> Prompt:
    try:
        row = json.loads(line)
        meta = {k: v for k, v in row.items() if k not in ("prompt", "negative")}
        if isinstance(meta.get("control"), str):
            meta["control"] = str(path.parent / Path(meta["control"]).expanduser())
        prompt = Prompt(row["prompt"], row.get("negative") or "", meta)
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
        prompt = None
    if prompt is None or not isinstance(prompt.text, str) or not isinstance(prompt.negative, str):
        raise ValueError(f'{path}:{number} must be a JSON object with a "prompt"; got {line[:80]!r}')
    return prompt
