"""MM-RLHF-Reward from its published layout against transformers' own network, and the averaging of critiques."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rewards
from rewards import Ask, Critique, MMRLHFJudge
from rewards.critique import Assessor, processor_of
from tests.rewards import tiny, tiny_vlm
from tests.rewards.scribe import Scribe, bright
from tests.rewards.tiny_critique import save_mmrlhf


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("mmrlhf")
    return folder, save_mmrlhf(folder)


@pytest.fixture(scope="module")
def judge(made) -> MMRLHFJudge:
    return MMRLHFJudge(str(made[0]), dtype="float32")


class TestMMRLHF:
    def test_the_network_is_the_one_that_was_saved(self, made, judge):
        own, found = made[1].state_dict(), judge.network.state_dict()
        assert own.keys() == found.keys() and all(torch.equal(own[name], found[name]) for name in own)
        assert judge.network.config.image_grid_pinpoints == [[30, 30], [30, 60], [60, 30], [60, 60]]
        assert judge.network.config.text_config.rope_parameters["rope_theta"] == 1e6

    def test_the_dialogue_is_chatml(self, judge):
        text = judge.text(Ask("What?", (tiny.natural(1, 20, 20)[0],), start="It is fine."))
        assert text == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
            "<|im_start|>assistant\nIt is fine."
        )

    @pytest.mark.parametrize("size", [(28, 28), (40, 60), (90, 30)])
    def test_rewards_are_the_heads_of_the_last_state(self, made, judge, size):
        """By hand: transformers' network as it was made, its processor, the weights as they are in the file."""
        image = tiny.natural(1, *size, seed=size[0])[0]
        ask = Ask("What?", (image,))
        processor = processor_of(made[1].config, judge.processor.tokenizer)
        chat = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a red cat"}]},
        ]
        text = processor.apply_chat_template(chat, tokenize=False)
        inputs = processor(text=[text], images=[(255 * image).round().byte()], return_tensors="pt")
        with torch.no_grad():
            state = made[1].model(**inputs).last_hidden_state[0, -1]
        head = {k: v for f in made[0].glob("*.safetensors") for k, v in load_file(f).items() if k.startswith("rm_head")}
        dense = torch.tanh(head["rm_head.dense.weight"] @ state + head["rm_head.dense.bias"])
        expected = head["rm_head.out_proj.weight"] @ dense + head["rm_head.out_proj.bias"]
        torch.testing.assert_close(judge.assess([ask], ["a red cat"]), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("size", "reward", "tolerance"), [((384, 384), 0.3616091609, 1e-5), ((600, 400), 0.4156872034, 2e-3)]
    )
    def test_the_published_code_gives_the_same(self, tmp_path, size, reward, tolerance):
        """Recorded from MM-RLHF's LlavaQwenForCausalLM (commit 7c8af1d, rm_forward, tiles as in training) with these weights and
        pictures; it resizes in PIL, transformers in torch, which tells where a picture is resized."""
        save_mmrlhf(tmp_path, side=384)
        image = (255 * tiny.natural(1, *size, seed=size[0])[0]).round() / 255
        found = MMRLHFJudge(str(tmp_path), dtype="float32").assess([Ask("What is it?", (image,))], ["It is a red cat"])
        assert found.item() == pytest.approx(reward, abs=tolerance)

    def test_words_are_those_of_the_network(self, made, judge):
        asks = [Ask("what is this?", (image,)) for image in tiny.natural(2, 40, 60)]
        ((first, second), again) = judge.write(asks, max_tokens=6), judge.write(asks[1:], max_tokens=6)
        assert first and second and again == [second]
        drawn = judge.write([replace(asks[0], seed=seed) for seed in (0, 1, 0)], temperature=5.0, max_tokens=6)
        assert drawn[0] == drawn[2] != drawn[1]

    def test_no_answer_has_no_reward(self, judge):
        found = judge.assess([Ask("What?")] * 3, ["a cat", None, "a dog"])
        assert found.isnan().tolist() == [False, True, False] and found[0] != found[2]

    @pytest.mark.parametrize("key", ["rm_head.out_proj.bias", "model.norm.weight", "model.image_newline"])
    def test_missing_weights_are_named(self, made, tmp_path, key):
        for file in made[0].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        for file in tmp_path.glob("*.safetensors"):
            save_file({k: v for k, v in load_file(file).items() if k != key}, file)
        with pytest.raises(ValueError, match=f"lacks .*{key.rpartition('.')[2]}"):
            MMRLHFJudge(str(tmp_path))

    def test_other_folders(self, tmp_path):
        tiny_vlm.save_qwen2_vl(tmp_path)
        with pytest.raises(OSError, match="LLaVA-OneVision in LLaVA-NeXT's layout"):
            MMRLHFJudge(str(tmp_path))


class Length(Scribe, Assessor):
    """Rewards an answer by its length; has no words of its own."""

    def assess(self, asks, answers):
        return torch.tensor([math.nan if answer is None else float(len(answer)) for answer in answers])


class TestCritique:
    def test_critiques_are_asked_for_as_published_and_averaged(self):
        critic = Scribe(lambda ask: None if ask.seed == 2 and bright(ask.media[0]) > 0.5 else " " + "x" * 2**ask.seed)
        reward = Critique(Length(lambda _: None), critic, samples=3, temperature=0.7)
        media = torch.stack([torch.full((3, 8, 8), v) for v in (0.2, 0.8)])
        scores = reward.score(media, ["a cat", "a dog"])
        assert scores.total.tolist() == pytest.approx([7 / 3, 1.5])  # spaces are stripped, failures left out
        assert scores.parts["spread"].tolist() == pytest.approx([math.sqrt(14) / 3, 0.5])
        text = critic.asks[0].text
        assert text.startswith("You are an unbiased") and text.endswith("[LMM Response]: a cat\n\n[Evaluation]:")
        assert [ask.seed for ask in critic.asks] == [0, 1, 2] * 2 and critic.how["temperature"] == 0.7

    def test_without_a_critic_the_assessor_writes(self):
        assessor = Length(lambda _: "fine")
        assert Critique(assessor)(torch.rand(2, 3, 8, 8), ["a cat", "a dog"]).tolist() == [4, 4]
        assert Critique(Length(lambda _: None))(torch.rand(1, 3, 8, 8), ["a cat"]).isnan().all()

    def test_errors(self):
        with pytest.raises(ValueError, match="drawn at a temperature"):
            Critique(Length(lambda _: ""), samples=2)
        with pytest.raises(ValueError, match=r"must hold \{prompt\}"):
            Critique(Length(lambda _: ""), answer="a cat")

    def test_the_prompt_is_data(self):
        file = Path(rewards.__file__).parent / "questions" / "mmrlhf.json"
        data = json.loads(file.read_text())
        assert data["licence"] == "Apache-2.0" and "github.com/Kwai-YuanQi/MM-RLHF at " in data["source"]
