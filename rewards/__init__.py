"""Rewards: score images, video, audio and tokens. Works alone; imports nothing of kilter's other packages."""

from .base import Modality, Prompt, Reward, Scores, as_prompts

KILTER = True  # lets `align` recognise a stranger's package of the same name

__all__ = ["Modality", "Prompt", "Reward", "Scores", "as_prompts"]
