"""Sounds: .wav files of PCM (8, 16, 24 or 32 bits) or floats (32 or 64 bits), any number of channels."""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from .media import Media

__all__ = ["load_wav"]

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
KINDS = {(PCM, 8): "u1", (PCM, 16): "<i2", (PCM, 24): "u1", (PCM, 32): "<i4", (FLOAT, 32): "<f4", (FLOAT, 64): "<f8"}
OPEN = 0xFFFFFFFF  # the length of data that were written to a pipe: all that follows


def load_wav(media: Media) -> tuple[Tensor, int]:
    """(C, N) float32, where PCM of b bits is divided by 2^(b - 1); and samples a second.

    Raises:
        ValueError: it cannot be read, and why.
    """
    chunks = _chunks(media)
    try:
        code, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunks[b"fmt "])
        if code == EXTENSIBLE:
            (code,) = struct.unpack_from("<H", chunks[b"fmt "], 24)
        data = chunks[b"data"]
    except (KeyError, struct.error) as error:
        raise ValueError(f"{media.name} is not a .wav file that can be read, it may be truncated") from error
    if (code, bits) not in KINDS:
        raise ValueError(f"{media.name} holds samples of {bits} bits in format {code}: convert it to PCM or floats")
    if not data or channels < 1 or len(data) % (channels * bits // 8):
        raise ValueError(f"{media.name} holds {len(data)} bytes of sound, no whole number of {channels} × {bits} bits")
    values = np.frombuffer(data, KINDS[code, bits])
    if bits == 24:  # the upper bytes of 32 bits
        values = np.pad(values.reshape(-1, 3), ((0, 0), (1, 0))).view("<i4")[:, 0]
    floats = values.astype(np.float32)
    if code == PCM:
        floats = (floats - 128) / 128 if bits == 8 else floats / 2 ** (8 * values.itemsize - 1)
    return torch.from_numpy(floats.reshape(-1, channels).T.copy()), rate


def _chunks(media: Media) -> dict[bytes, bytes]:
    """The parts of the file by name."""
    data, at, found = media.data(), 12, {}
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError(f"{media.name} is not a .wav file: convert it, as ffmpeg -i {media.name} sound.wav does")
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        if size != OPEN and at + 8 + size > len(data):
            raise ValueError(f"{media.name} is cut off: {size} bytes expected at {at + 8}, {len(data) - at - 8} there")
        found.setdefault(name, data[at + 8 : at + 8 + size])
        at += 8 + size + size % 2
    return found
