"""What goes over the wire to a served judge and what comes back: files of media, odds in a reply.

Among the listed first tokens of a chat completion, one belongs to a choice if it is one of its spellings, or, for a choice of which
no spelling is listed whole, if one of them (and of no other choice) begins with it: the first token of a word that the tokenizer
splits. A choice that is not listed gets the most it can have: the smallest listed mass, or what the list leaves over if that is
less. A list without any choice is no answer.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["TOLD", "Unanswered", "eight_bits", "listed_odds", "mp4_uri", "png", "typed_odds", "written", "yes_first"]

TOLD = 200  # characters of a server's message that an error quotes
ROUNDED_AWAY = 2.0**-25  # half the last bit of a float32 probability near 1
SPARE = 0.01  # by which listed probabilities may sum to more than one: servers round


class Unanswered(Exception):
    """The server gave no answer; the message says why."""


def eight_bits(media: Tensor) -> Any:
    """(..., 3, H, W) in [0, 1] -> (..., H, W, 3) levels as an array."""
    return (255 * media.detach().float().clamp(0, 1)).round().byte().movedim(-3, -1).cpu().numpy()


def png(image: Tensor) -> str:
    """(3, H, W) as a file, in base64."""
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(eight_bits(image)).save(file, format="PNG", compress_level=1)
        return base64.b64encode(file.getvalue()).decode()


def mp4_uri(video: Tensor, fps: float) -> str:
    """(F, 3, H, W) as the data URI of a file, nearly without loss; odd sides lose their last line.

    Raises:
        ImportError: PyAV is missing.
    """
    from fractions import Fraction

    try:
        import av  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError('video="mp4" needs PyAV: pip install \'kilter[video]\', or send video="frames"') from error
    levels = eight_bits(video)
    height, width = (side - side % 2 for side in levels.shape[1:3])
    with io.BytesIO() as file:
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "10"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for picture in levels:
                frame = av.VideoFrame.from_ndarray(picture[:height, :width].copy(), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return f"data:video/mp4;base64,{base64.b64encode(file.getvalue()).decode()}"


def written(reply: Any) -> str:
    """The words of a chat completion."""
    try:
        text = reply["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise Unanswered(f"the reply holds no text: {json.dumps(reply)[:TOLD]}")
    return text


def listed_odds(reply: Any, choices: Sequence[Sequence[str]]) -> list[float]:
    """The log-probabilities of choices among the listed first tokens of a chat completion; see the module docstring.

    Raises:
        Unanswered: the reply lists none of them, or no probabilities.
    """
    try:
        first = reply["choices"][0]["logprobs"]["content"][0]
        listed = {str(t["token"]): float(t["logprob"]) for t in [*first["top_logprobs"], first][::-1]}
    except (LookupError, TypeError, ValueError):
        known = '; `transformers serve` knows probabilities="systemone" instead'
        raise Unanswered(f"the reply holds no logprobs{known}: {json.dumps(reply)[:TOLD]}") from None
    mass = {token: math.exp(value) for token, value in listed.items()}
    left = 1 - sum(mass.values())
    if not left >= -SPARE:
        raise Unanswered(f"the listed probabilities sum to {1 - left:.3g}")
    found = [sum(mass[token] for token in belonging(i, choices, mass)) for i in range(len(choices))]
    if not any(found):
        raise Unanswered(f"none of {[choice[0] for choice in choices]} is among the likely answers {list(listed)[:8]}")
    smallest = min((value for value in mass.values() if value), default=0.0)  # -9999 is vLLM's nothing
    most = min(smallest, left) if left > 0 else smallest
    return [math.log(value or most) if value or most else -math.inf for value in found]


def belonging(index: int, choices: Sequence[Sequence[str]], tokens: Mapping[str, float]) -> list[str]:
    """The listed tokens that begin a choice."""
    whole = [token for token in tokens if token in choices[index]]
    if whole:
        return whole
    others = [spelling for i, choice in enumerate(choices) if i != index for spelling in choice]
    begun = [
        token
        for token in tokens
        if token.strip()
        and any(s.startswith(token) for s in choices[index])
        and not any(s.startswith(token) for s in others)
    ]
    return [max(begun, key=len)] if begun else []


def yes_first(choices: Sequence[Sequence[str]]) -> bool | None:
    """Whether the choices are Yes and No in this order, in the other order, or something else (None)."""
    words = [choice[0].strip().lower() for choice in choices]
    return {("yes", "no"): True, ("no", "yes"): False}.get(tuple(words))  # type: ignore[arg-type]


def typed_odds(reply: Any, choices: Sequence[Sequence[str]]) -> list[float]:
    """The log-probabilities in a System One reply."""
    first = yes_first(choices)
    try:
        answer = reply["answers"]["answer"]
        if first is None:
            found = [float(answer["probabilities"][choice[0]]) for choice in choices]
        else:
            found = [float(answer["noul"]), 1 - float(answer["noul"])][:: 1 if first else -1]
    except (LookupError, TypeError, ValueError):
        raise Unanswered(f"the reply holds no probabilities: {json.dumps(reply)[:TOLD]}") from None
    if not abs(sum(found) - 1) <= SPARE or min(found) < 0:
        raise Unanswered(f"the probabilities are {found}")
    return [math.log(max(value, ROUNDED_AWAY)) for value in found]
