"""Questions to tiny judges: Qwens, which give gradients, a LLaVA, which gives none, and a CLIP-FlanT5."""

from __future__ import annotations

import pytest

import rewards
from tests.rewards import tiny, tiny_vlm
from tests.rewards.cases import Case


def judge(request: pytest.FixtureRequest, kind: str) -> rewards.LocalJudge:
    return rewards.LocalJudge(str(request.getfixturevalue("vlm_folders")[kind]), dtype="float32", batch=3)


def flant5(request: pytest.FixtureRequest) -> rewards.CLIPFlanT5:
    path = request.getfixturevalue("tmp_path")
    model, tokenizer = (
        tiny_vlm.save_clip_flant5(path / "model", path / "clip"),
        tiny_vlm.save_t5_tokenizer(path / "tokenizer"),
    )
    return rewards.CLIPFlanT5(str(model), str(tokenizer), str(path / "clip"), dtype="float32")


CASES: dict[str, Case] = {
    "CLIPFlanT5": Case(flant5, tolerance=1e-6, size=None),
    "QAlign": Case(lambda r: rewards.QAlign(judge(r, "qwen2_5_vl")), size=None),
    "Rating": Case(lambda r: rewards.Rating(judge(r, "qwen3_vl")), size=None),
    "VQAScore": Case(lambda r: rewards.VQAScore(judge(r, "llava_onevision")), size=None),
    "YesNo": Case(
        lambda r: rewards.YesNo(judge(r, "qwen2_vl"), score="log_odds", modality="video"),
        media=lambda: (0.1 + 0.8 * tiny.natural(12, 36, 43)).unflatten(0, (4, 3)),
        tolerance=1e-4,
        size=None,
    ),
}
