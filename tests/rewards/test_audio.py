"""Audio rewards: CLAP against transformers' own extractor and model, loudness against ITU-R BS.1770-4, filters against tones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from torch import Tensor

from rewards import CLAPScore, Clipping, Loudness, Silence
from rewards.audio import PADDING, resampled, weighted, windows
from tests.rewards import tiny_audio
from tests.rewards.tiny_audio import RATE, sounds

PROMPTS = ["a red cat", "two dog on the house", "the blue bird", "photo of a car"]


@pytest.fixture(scope="module", params=[False, True], ids=["single", "fused"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_audio.save_clap(tmp_path_factory.mktemp("clap"), request.param))


def published(folder: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Spectrograms and cosines of transformers' own extractor and model, for clips of at most a window: (B, N) -> ..., (B,)."""
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

    model = ClapModel.from_pretrained(folder).eval()
    extractor = ClapFeatureExtractor.from_pretrained(folder)
    read = extractor([row.numpy() for row in x], sampling_rate=RATE, return_tensors="pt")
    read["is_longer"] = torch.zeros(len(x), 1, dtype=torch.bool)  # where fused, the extractor marks one at random
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS[: len(x)], padding=True, return_tensors="pt")
    read["input_features"] = read["input_features"].float()
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], **read)
    return read["input_features"][:, 0], (out.audio_embeds * out.text_embeds).sum(dim=-1)


def test_a_window_is_read_as_the_published_extractor_reads_it(folder: str) -> None:
    x = sounds()
    mels, cosines = published(folder, x[:, 0])
    reward = CLAPScore(folder, sample_rate=RATE)
    torch.testing.assert_close(reward.spectrogram(x[:, 0]), mels, rtol=0, atol=2e-4)  # dB
    torch.testing.assert_close(reward(x, PROMPTS), cosines, rtol=0, atol=1e-5)
    assert cosines.std() > 0.05


def test_pure_tones_and_silence_are_exact_too(folder: str) -> None:
    time = torch.arange(RATE, dtype=torch.float64) / RATE
    x = torch.stack([torch.sin(2 * torch.pi * 440 * time), 0 * time]).float()
    mels, _ = published(folder, x)
    torch.testing.assert_close(CLAPScore(folder, sample_rate=RATE).spectrogram(x), mels, rtol=0, atol=1e-3)
    assert (mels[1] == -100).all()


def test_short_clips_are_repeated_as_the_checkpoint_says(folder: str) -> None:
    x = sounds(samples=RATE * 3 // 8)
    _, cosines = published(folder, x[:, 0])
    torch.testing.assert_close(CLAPScore(folder, sample_rate=RATE)(x, PROMPTS), cosines, rtol=0, atol=1e-5)


def test_long_clips_are_the_mean_of_windows_that_cover_them(folder: str) -> None:
    x, reward = sounds(samples=RATE * 5 // 2), CLAPScore(folder, sample_rate=RATE)
    starts = (0, 12_000, 24_000)
    parts = torch.stack([reward(x[..., s : s + RATE], PROMPTS) for s in starts])
    torch.testing.assert_close(reward(x, PROMPTS), parts.mean(dim=0), rtol=0, atol=1e-6)


def test_stereo_is_averaged_and_the_logit_is_the_scaled_cosine(folder: str) -> None:
    x = sounds(channels=2)
    cosine = CLAPScore(folder, sample_rate=RATE)(x, PROMPTS)
    torch.testing.assert_close(CLAPScore(folder, sample_rate=RATE)(x.mean(1, keepdim=True), PROMPTS), cosine)
    logit = CLAPScore(folder, "logit", sample_rate=RATE)(x, PROMPTS)
    torch.testing.assert_close(logit, cosine / 0.07, rtol=1e-4, atol=1e-4)  # the initial scale


def test_another_sample_rate_scores_alike(folder: str) -> None:
    x = sounds()
    half = resampled(x[:, 0], RATE, RATE * 3)[:, None]
    gap = CLAPScore(folder, sample_rate=3 * RATE)(half.clamp(-1, 1), PROMPTS) - CLAPScore(folder, sample_rate=RATE)(
        x, PROMPTS
    )
    assert gap.abs().max() < 0.02


def test_an_extractor_of_another_model_is_refused(folder: str, tmp_path: Path) -> None:
    for file in Path(folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    config["truncation"] = "rand_trunc" if config["truncation"] == "fusion" else "fusion"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another model's"):
        CLAPScore(str(tmp_path))
    with pytest.raises(ValueError, match="variant"):
        CLAPScore(folder, "sum")  # type: ignore[arg-type]


@pytest.mark.parametrize("padding", PADDING)
def test_windows_of_short_clips(padding: str) -> None:
    expected = {
        "repeatpad": [1, 2, 3, 1, 2, 3, 0, 0],
        "repeat": [1, 2, 3, 1, 2, 3, 1, 2],
        "pad": [1, 2, 3, 0, 0, 0, 0, 0],
    }
    assert windows(torch.tensor([[1, 2, 3]]), 8, padding).tolist() == [[expected[padding]]]
    assert windows(torch.arange(8)[None], 8, padding).tolist() == [[list(range(8))]]


def test_windows_cover_long_clips_to_both_ends() -> None:
    found = windows(torch.arange(20)[None], 8, "pad")[0]
    assert found[:, 0].tolist() == [0, 6, 12]
    assert set(found.flatten().tolist()) == set(range(20))


@pytest.mark.parametrize(("rate", "wanted"), [(16_000, 48_000), (44_100, 48_000), (48_000, 16_000)])
def test_a_resampled_tone_is_the_tone(rate: int, wanted: int) -> None:
    def tone(frequency: float, r: int) -> Tensor:
        return torch.sin(2 * torch.pi * frequency * torch.arange(r, dtype=torch.float64) / r)[None]

    inner = slice(wanted // 20, -wanted // 20)
    for frequency in (100.0, 1000.0, 5000.0):
        got = resampled(tone(frequency, rate), rate, wanted)
        assert got.shape == (1, wanted)
        torch.testing.assert_close(got[:, inner], tone(frequency, wanted)[:, inner], rtol=0, atol=5e-4)
    if wanted < rate:  # what the lower rate cannot hold is gone instead of folded back
        assert resampled(tone(9000.0, rate), rate, wanted)[:, inner].abs().max() < 1e-2


def test_resampling_keeps_what_it_can_and_refuses_what_is_too_long() -> None:
    x = torch.randn(2, 500)
    assert resampled(x, RATE, RATE) is x
    with pytest.raises(ValueError, match="beforehand"):
        resampled(x, 44_101, 48_000)


def sine(decibels: float, rate: int = 48_000, seconds: float = 5.0) -> Tensor:
    """997 Hz, the frequency of the standard's calibration: (1, 1, N)."""
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    return 10 ** (decibels / 20) * torch.sin(2 * torch.pi * 997 * time)[None, None]


def test_loudness_of_the_standard() -> None:
    reward = Loudness(-23.0)
    scores = reward.score(torch.cat([sine(0), sine(-20)]))
    torch.testing.assert_close(scores.parts["loudness"], torch.tensor([-3.01, -23.01]), rtol=0, atol=5e-3)
    torch.testing.assert_close(scores.total, torch.tensor([-19.99, -0.01]), rtol=0, atol=5e-3)
    both = reward.score(torch.cat([sine(-20), sine(-20)], dim=1)).parts["loudness"]
    torch.testing.assert_close(both, torch.tensor([-20.0]), rtol=0, atol=5e-3)  # channels add up


def test_loudness_of_ebu_tech_3341() -> None:
    """Minimum requirements 1 to 4: stereo sines at 1 kHz, whose quiet stretches must not count."""

    def signal(levels: list[tuple[float, float]]) -> Tensor:
        rate = 48_000
        parts = [
            10 ** (db / 20) * torch.sin(2 * torch.pi * 1000 * torch.arange(int(s * rate), dtype=torch.float64) / rate)
            for db, s in levels
        ]
        return torch.cat(parts).expand(1, 2, -1)

    cases = {
        -23.0: [[(-23.0, 20.0)], [(-36.0, 10.0), (-23.0, 60.0), (-36.0, 10.0)]],
        -33.0: [[(-33.0, 20.0)]],
    }
    cases[-23.0].append([(-72.0, 10.0), (-36.0, 10.0), (-23.0, 60.0), (-36.0, 10.0), (-72.0, 10.0)])
    for expected, signals in cases.items():
        for levels in signals:
            loudness = Loudness().score(signal(levels).float()).parts["loudness"].item()
            assert abs(loudness - expected) < 0.1


def test_k_weighting_has_the_coefficients_of_the_standard() -> None:
    x = sounds(1).double()
    y = lfilter(
        [1.53512485958697, -2.69169618940638, 1.19839281085285], [1, -1.69065929318241, 0.73248077421585], x.numpy()
    )
    y = lfilter([1.0, -2.0, 1.0], [1, -1.99004745483398, 0.99007225036621], y)
    np.testing.assert_allclose(weighted(x, 48_000).numpy(), y, rtol=0, atol=1e-9)


def test_loudness_at_other_rates_and_of_silence() -> None:
    for rate, allowed in ((44_100, 0.01), (16_000, 0.06)):
        loudness = Loudness(sample_rate=rate).score(sine(-20, rate)).parts["loudness"].item()
        assert abs(loudness + 23.01) < allowed
    assert Loudness().score(torch.cat([sine(-90), sine(-20)])).total.isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match=r"0\.4 s"):
        Loudness()(sine(0, seconds=0.3))
    with pytest.raises(ValueError, match="8000"):
        Loudness(sample_rate=4000)


def test_clipping_and_silence_are_shares() -> None:
    x = torch.zeros(1, 1, 1000)
    x[..., :250] = 1.0
    x[..., 250:500] = -0.5
    assert Clipping()(x).item() == -0.25
    assert Clipping(0.5)(x).item() == -0.5
    assert Silence(piece=0.125, sample_rate=1000)(x).item() == -0.5
    assert Silence(threshold=-3.0, piece=0.125, sample_rate=1000)(x).item() == -0.75
    with pytest.raises(ValueError, match="shorter piece"):
        Silence()(x)
    with pytest.raises(ValueError, match="threshold"):
        Clipping(0.0)
    with pytest.raises(ValueError, match="sample_rate"):
        Silence(sample_rate=0)


def test_a_level_of_minus_sixty_is_where_silence_begins() -> None:
    for db, silent in ((-59.0, 0.0), (-61.0, -1.0)):
        x = torch.full((1, 1, 4800), 10 ** (db / 20))
        assert math.isclose(Silence()(x).item(), silent, abs_tol=0)
