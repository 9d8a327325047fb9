"""Laws of PixArt: our rollouts equal its pipelines' own samples, latents and pixels."""

from __future__ import annotations

import pytest
import torch
from diffusers import PixArtSigmaPipeline

from align import load_policy
from samplers import SeededNoise, rollout
from samplers.families.pixart import PixArt
from tests.samplers.families.compare import PROMPTS, compare
from tests.samplers.families.tiny.pixart import VARIANTS, build


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rollouts_equal_the_pipelines(variant, guidance, tmp_path):
    pipe = VARIANTS[variant]()
    if guidance > 1:
        pipe.save_pretrained(tmp_path)
        policy = load_policy(tmp_path, device="cpu")
    else:
        policy = PixArt(pipe)
    assert isinstance(policy, PixArt)
    for size in ((16, 16), (16, 24)):
        compare(pipe, policy, guidance, size)


def test_a_network_without_a_variance_is_taken_as_it_is():
    pipe = build(variance=False)
    compare(pipe, PixArt(pipe), 4.5, (16, 16))


def test_defaults_are_the_pipelines():
    policies = {name: PixArt(make()) for name, make in VARIANTS.items()}
    assert [p.max_sequence_length for p in policies.values()] == [120, 120, 120, 300]
    assert [(p.guidance, p.steps, p.few_step) for p in policies.values()] == [
        (4.5, 20, False),
        (4.5, 20, False),
        (1.0, 4, True),
        (4.5, 20, False),
    ]
    assert policies["alpha"].size == (16, 16) and policies["alpha-1024"].size == (256, 256)
    assert policies["alpha"].multiple == 4
    assert [p.sized for p in policies.values()] == [False, True, False, False]


def test_levels_are_those_of_the_scheduler():
    pipe = build()
    policy = PixArt(pipe)
    levels = policy.levels(20)
    pipe.scheduler.set_timesteps(20)
    assert levels.t[:-1].tolist() == pipe.scheduler.timesteps.tolist()
    torch.testing.assert_close(levels.sigma / levels.alpha, pipe.scheduler.sigmas.double())
    assert float(levels.sigma[-1]) == 0


def test_padding_is_not_heard():
    """What stands where the mask says there is no token changes nothing; what stands where there is one does."""
    policy = PixArt(build())
    cond, at = policy.encode(PROMPTS), policy.levels(3)[1]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens, mask = cond.positive["encoder_hidden_states"], cond.positive["encoder_attention_mask"]
    assert mask.sum(1).tolist() == [len(p.text.replace(" ", "")) + len(p.text.split()) + 1 for p in PROMPTS]
    before = policy.predict(x, at, cond)
    tokens[mask == 0] += 1
    torch.testing.assert_close(policy.predict(x, at, cond), before, rtol=0, atol=1e-5)
    tokens[mask == 1] += 1
    assert float((policy.predict(x, at, cond) - before).abs().max()) > 1e-2


def test_a_text_means_the_same_on_both_sides_and_in_any_case():
    policy = PixArt(build(PixArtSigmaPipeline))
    cond = policy.encode([" A CAT", "a cat "])
    rows = cond.positive["encoder_hidden_states"]
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=0)
    flipped = policy.encode([PROMPTS[0].negative]).positive["encoder_hidden_states"]
    assert torch.equal(policy.encode(PROMPTS).negative["encoder_hidden_states"][:1], flipped)


def test_time_text_and_guidance_are_heard():
    policy = PixArt(build())
    cond, levels = policy.encode(PROMPTS), policy.levels(3)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    outputs = policy.predict(x, levels[0], cond)
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-3
    assert float((outputs - policy.predict(x, levels[1], cond)).abs().max()) > 1e-3
    noise = SeededNoise([0, 1], policy.shape((16, 16)))
    plain, guided = (rollout(policy, policy.kernel, cond.with_guidance(g), levels, noise).x0 for g in (1.0, 4.5))
    assert float((plain - guided).abs().max()) > 1e-3


def test_the_published_form_of_the_tokenizer_loads(tmp_path):
    """Its folders hold T5's words as a SentencePiece model alone."""
    import io

    import sentencepiece

    build().save_pretrained(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    model = io.BytesIO()
    letters = list("abcdefghijklmnopqrstuvwxyz")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(letters), "red blue cat"]), model_writer=model, vocab_size=30, character_coverage=1.0,
        model_type="char", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(model.getvalue())
    policy = load_policy(tmp_path, device="cpu")
    assert policy.pipe.tokenizer("a cat").input_ids[-1] == 1
    assert policy.encode(["a red cat", "cat"]).positive["encoder_attention_mask"].sum(1).tolist() == [11, 5]
