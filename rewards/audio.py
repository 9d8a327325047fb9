"""Audio rewards: agreement with the prompt by CLAP, and guards against what CLAP does not hear.

`CLAPScore`: with e_t the unit embedding of the prompt and e_w that of each window of 10 s, s = mean_w e_w · e_t. A window becomes a
log-mel spectrogram,

    10 log10 max(1e-10, M |STFT(x)|²)

with a Hann window of 1024 samples every 480 at 48 kHz and M the model's own filters (Slaney's for a model that reads one window,
HTK's for a "fused" one), as transformers' numpy extractor computes it.

Deviations. The extractor takes a random crop of a longer clip, and a fused model sees three random crops beside the whole: here
windows of fixed places cover the clip evenly and count alike, each read as a clip of its own. The released pipeline rounds samples
to 16 bits first; here they stay as they are, so that the score has a gradient.

The guards `Loudness`, `Clipping` and `Silence` say whether a clip is well recorded at all; loudness is what optimisation raises
first.

Sources: Wu et al., "Large-scale Contrastive Language-Audio Pretraining", 2022, arXiv 2211.06687. Loudness: ITU-R BS.1770-4, 2015.
Resampling: Smith, "Digital Audio Resampling", 2002: a sinc under a Hann window.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Prompt, Reward, Scores
from .dual import DType, DualEncoder, pooled, unit
from .loading import expand, loading, pretrained, pretrained_tokenizer, warn_if_cut
from .preprocess import at_least_float32

__all__ = ["CLAPScore", "Clipping", "Loudness", "Silence"]

CROSSINGS = 16  # zero crossings of the sinc on either side
TAPS = 10_000_000  # of all phases of a filter, beyond which two sample rates share too little
ROLLOFF = 0.99  # of the Nyquist frequency, where the filter of resampling cuts
FLOOR = 1e-10  # of the power in a mel band: -100 dB


class CLAPScore(DualEncoder):
    """Agreement of sound and prompt by a CLAP in the transformers layout.

    Range: "cosine" -1 to 1, mostly 0 to 0.6; "logit" the same times the learned scale
    Size: 10 s at 48 kHz; longer clips are read in windows, shorter ones repeated; stereo is averaged
    Gradient: yes
    Weights: laion/clap-htsat-unfused, laion/larger_clap_general, laion/larger_clap_music, laion/clap-htsat-fused
    Licence: Apache-2.0

    Nearly deaf to loudness and to the order of events; pair it with `Loudness`.

    Args:
        model: folder or hub id of a CLAP.
        variant: "cosine", or "logit": times the learned scale.
        sample_rate: of the media, in Hz.
        dtype: type the networks run in; spectrogram and score are in float32 at least.

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the files hold another kind of model, or an extractor that is not understood.
    """

    modality = "audio"

    def __init__(
        self,
        model: str = "laion/clap-htsat-unfused",
        variant: Literal["cosine", "logit"] = "cosine",
        *,
        sample_rate: int = 48_000,
        dtype: DType = "float32",
    ) -> None:
        if variant not in ("cosine", "logit"):
            raise ValueError(f"variant must be cosine or logit; got {variant!r}")
        super().__init__(variant, dtype)
        from transformers import ClapFeatureExtractor, ClapModel

        self.sample_rate = positive(sample_rate)
        network = pretrained(ClapModel, model)
        self.tokenizer = pretrained_tokenizer(model)
        with loading(model, "preprocessor_config.json"):
            self.extractor: Any = ClapFeatureExtractor.from_pretrained(expand(model))
        self.fused, truncation = network.config.audio_config.enable_fusion, self.extractor.truncation
        if truncation != ("fusion" if self.fused else "rand_trunc") or self.extractor.padding not in PADDING:
            raise ValueError(
                f"{model!r} reads {'fused' if self.fused else 'single'} windows, yet its extractor is set to truncation "
                f"{truncation!r}, padding {self.extractor.padding!r}: the preprocessor_config.json is another model's"
            )
        filters = self.extractor.mel_filters if self.fused else self.extractor.mel_filters_slaney
        self.register_buffer("filters", torch.from_numpy(filters), persistent=False)  # (frequencies, mels) float64
        self.scale, self.bias = network.logit_scale_a.detach().double().exp().item(), 0.0
        words = network.config.text_config  # RoBERTa counts positions from behind the one of the padding
        self.length = min(self.tokenizer.model_max_length, words.max_position_embeddings - words.pad_token_id - 1)
        self.model = network.to(self.dtype)
        self.freeze()

    def embeddings(self, media: Tensor, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """The mean of the windows' unit vectors and the prompts' unit vectors, (B, D) each."""
        x, wanted = at_least_float32(media).mean(dim=1), self.extractor.sampling_rate
        clips = windows(resampled(x, self.sample_rate, wanted), self.extractor.nb_max_samples, self.extractor.padding)
        sound = unit(self.encode_image(self.spectrogram(clips.flatten(0, 1)).to(self.tower_dtype)))
        return sound.unflatten(0, clips.shape[:2]).mean(dim=1), self.text_features([p.text for p in prompts])

    def encode_image(self, pixels: Tensor) -> Tensor:
        read: dict[str, Tensor] = {"input_features": pixels[:, None]}
        if self.fused:  # of four channels, what is not longer than a window uses the first
            read = {"input_features": pixels[:, None].expand(-1, 4, -1, -1)}
            read["is_longer"] = torch.zeros(len(pixels), 1, dtype=torch.bool, device=pixels.device)
        return pooled(self.model.get_audio_features(**read))

    def encode_text(self, texts: list[str]) -> Tensor:
        for text, ids in zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True):
            warn_if_cut(self.name, text, len(ids), self.length)
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        tokens = tokens.to(next(self.model.parameters()).device)
        return pooled(self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]))

    def spectrogram(self, x: Tensor) -> Tensor:
        """The log-mel spectrogram in dB: (B, N) -> (B, frames, mels) in the type of `x`.

        The transform is in float64 as the extractor's is: in float32 the bands beside a pure tone end in rounding noise well
        above the floor.
        """
        size, hop = self.extractor.fft_window_size, self.extractor.hop_length
        hann = torch.hann_window(size, dtype=torch.float64, device=x.device)
        spectrum = torch.stft(x.double(), size, hop, window=hann, pad_mode="reflect", return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        mel = power.transpose(1, 2) @ self.get_buffer("filters").double()
        return (10 * mel.clamp(min=FLOOR).log10()).to(x.dtype)


def positive(sample_rate: int) -> int:
    if sample_rate < 1:
        raise ValueError(f"sample_rate must be at least 1 Hz; got {sample_rate}")
    return sample_rate


PADDING = ("repeatpad", "repeat", "pad")


def windows(x: Tensor, span: int, padding: str) -> Tensor:
    """Windows that cover a clip evenly, the first at its beginning and the last at its end: (B, N) -> (B, W, span).

    A shorter clip is one window: "repeatpad" repeats it as often as it fits in whole and appends zeros, "repeat" fills the window
    with repetitions, "pad" only appends zeros.
    """
    samples = x.shape[1]
    if samples < span:
        times = {"repeatpad": span // samples, "repeat": -(-span // samples), "pad": 1}[padding]
        x = x.repeat(1, times)[:, :span]
        return F.pad(x, (0, span - x.shape[1]))[:, None]
    count = -(-samples // span)
    starts = [round(i * (samples - span) / max(count - 1, 1)) for i in range(count)]
    return torch.stack([x[:, start : start + span] for start in starts], dim=1)


def resampled(x: Tensor, rate: int, wanted: int) -> Tensor:
    """Band-limited resampling: (B, N) at `rate` Hz -> (B, ceil(N wanted / rate)) at `wanted` Hz; the same where they are equal.

    y[n] = sum_k x[k] h(n rate / wanted - k), h a sinc under a Hann window that cuts just below the lower Nyquist frequency. One
    strided convolution yields all phases.

    Raises:
        ValueError: the rates have too small a common divisor.
    """
    if rate == wanted:
        return x
    shared = math.gcd(rate, wanted)
    step, phases = rate // shared, wanted // shared
    if phases * step > TAPS:
        raise ValueError(
            f"{rate} Hz cannot be brought to {wanted} Hz in reasonable steps: resample the audio beforehand"
        )
    cut = ROLLOFF * min(step, phases) / step  # of the input's Nyquist frequency
    reach = math.ceil(CROSSINGS / cut)
    taps = torch.arange(-reach, step + reach, dtype=torch.float64, device=x.device)
    time = taps - step * torch.arange(phases, dtype=torch.float64, device=x.device)[:, None] / phases
    hann = torch.cos(math.pi * (cut * time / CROSSINGS).clamp(-1, 1) / 2).square()
    kernel = (cut * torch.sinc(cut * time) * hann).to(x.dtype)[:, None]
    padded = F.pad(x, (reach, reach + step))[:, None]
    out = F.conv1d(padded, kernel, stride=step)  # (B, phases, steps)
    return out.transpose(1, 2).flatten(1)[:, : math.ceil(x.shape[1] * phases / step)]


class Loudness(Reward):
    """Closeness of a clip's loudness to a target, in LU, by ITU-R BS.1770-4.

    Minus the distance |L - target|. L is the integrated loudness in LUFS: the power after the K-weighting filter in blocks of
    0.4 s, averaged over the blocks above -70 LUFS and no more than 10 LU below the mean of those. NaN for a clip that is all below
    -70 LUFS.

    Range: 0 and below; the part `loudness` is L itself, at most about 0
    Size: from 0.4 s, mono or stereo
    Gradient: yes

    Args:
        target: in LUFS: -14 for music on streaming services, -23 for broadcasts (EBU R 128).
        sample_rate: of the media, in Hz.

    Raises:
        ValueError: `sample_rate` is too low to hold the filter.
    """

    modality = "audio"
    needs_prompt = False

    def __init__(self, target: float = -14.0, *, sample_rate: int = 48_000) -> None:
        super().__init__()
        if sample_rate < 8000:
            raise ValueError(f"loudness needs a sample_rate of at least 8000 Hz; got {sample_rate}")
        self.target, self.sample_rate = target, sample_rate

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        loudness = integrated(at_least_float32(media), self.sample_rate)
        return Scores(-(loudness - self.target).abs(), {"loudness": loudness})


def integrated(x: Tensor, rate: int) -> Tensor:
    """Integrated loudness in LUFS: (B, C, N) -> (B,); NaN for silence.

    Raises:
        ValueError: the clip is shorter than a block, or has more than two channels.
    """
    block, hop = round(0.4 * rate), round(0.1 * rate)
    if x.shape[2] < block or x.shape[1] > 2:
        raise ValueError(
            f"loudness needs at least 0.4 s ({block} samples at {rate} Hz) of mono or stereo; got {x.shape[1]} channels "
            f"of {x.shape[2]}"
        )
    power = weighted(x, rate).square().unfold(2, block, hop).mean(dim=3).sum(dim=1)  # (B, blocks)
    gated = gated_mean(power, power > level(-70.0))
    gated = gated_mean(power, (power > level(-70.0)) & (power > 0.1 * gated[:, None]))
    return -0.691 + 10 * gated.log10()


def level(loudness: float) -> float:
    """The power that has a loudness in LUFS."""
    return 10 ** ((loudness + 0.691) / 10)


def gated_mean(power: Tensor, kept: Tensor) -> Tensor:
    """The mean of the blocks kept, NaN where none is: (B, blocks) -> (B,)."""
    return (power * kept).sum(dim=1) / kept.sum(dim=1)


def weighted(x: Tensor, rate: int) -> Tensor:
    """The K-weighting of BS.1770: a high shelf (the head) and a high pass, applied in the frequency domain.

    The standard lists coefficients for 48 kHz. These are the analogue filters behind them (corner, Q, gain as in libebur128) under
    the bilinear transform, which gives the same coefficients there and the same loudness at other rates.
    """
    size = x.shape[2] + rate  # 1 s of zeros, in which the high pass has rung out
    z = torch.exp(-2j * math.pi * torch.fft.rfftfreq(size, dtype=torch.float64, device=x.device))
    high, q, k = 10 ** (3.999843853973347 / 20), 0.7071752369554196, corner(1681.974450955533, rate)
    middle = high**0.4996667741545416
    shelf = biquad(z, (high + middle * k / q + k * k, 2 * (k * k - high), high - middle * k / q + k * k), k, q)
    f, q = 38.13547087602444, 0.5003270373238773
    gain = (
        1 + corner(f, 48_000) / q + corner(f, 48_000) ** 2
    )  # the standard's numerator is 1, -2, 1 whatever the denominator
    response = shelf * biquad(z, (gain, -2 * gain, gain), corner(f, rate), q)
    response = response.to(torch.promote_types(x.dtype, torch.complex64))
    return torch.fft.irfft(torch.fft.rfft(x, size) * response, size)[..., : x.shape[2]]


def corner(frequency: float, rate: int) -> float:
    """A frequency as the bilinear transform bends it."""
    return math.tan(math.pi * frequency / rate)


def biquad(z: Tensor, numerator: tuple[float, float, float], k: float, q: float) -> Tensor:
    """A filter of second order with corner `k` and quality `q`; `z` holds the delays exp(-iw)."""
    denominator = (1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k)
    above, below = (c[0] + c[1] * z + c[2] * z * z for c in (numerator, denominator))
    return above / below


class Clipping(Reward):
    """Minus the share of samples that are clipped.

    Range: -1 to 0, 0 where nothing is clipped
    Size: any
    Gradient: no

    Args:
        threshold: amplitude at and above which a sample counts as clipped.

    Raises:
        ValueError: `threshold` is not in (0, 1].
    """

    modality = "audio"
    differentiable = False
    needs_prompt = False

    def __init__(self, threshold: float = 0.999) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1; got {threshold}")
        self.threshold = threshold

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        return 0 - (media.abs() >= self.threshold).float().mean(dim=(1, 2))


class Silence(Reward):
    """Minus the share of time that is silent.

    Time is cut in pieces; a piece is silent where the root mean square of its samples, of all channels, is below `threshold`.

    Range: -1 to 0, 0 where something is heard all the time
    Size: from one piece
    Gradient: no

    Args:
        threshold: in dB below full scale.
        piece: in seconds.
        sample_rate: of the media, in Hz.

    Raises:
        ValueError: `piece` is shorter than a sample.
    """

    modality = "audio"
    differentiable = False
    needs_prompt = False

    def __init__(self, threshold: float = -60.0, piece: float = 0.05, *, sample_rate: int = 48_000) -> None:
        super().__init__()
        self.threshold, self.sample_rate = threshold, positive(sample_rate)
        self.samples = round(piece * sample_rate)
        if self.samples < 1:
            raise ValueError(f"a piece must last at least one sample; got {piece} s at {sample_rate} Hz")

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        if media.shape[2] < self.samples:
            raise ValueError(
                f"{self.name} needs at least one piece of {self.samples} samples; got {media.shape[2]}: pass a shorter piece"
            )
        power = at_least_float32(media).square().mean(dim=1).unfold(1, self.samples, self.samples).mean(dim=2)
        return 0 - (power < 10 ** (self.threshold / 10)).float().mean(dim=1)
