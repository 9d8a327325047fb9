"""The model card: README.md in the hub's format, made from `result.json`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rewards import Prompt
from samplers import Policy

from .adapters import ADAPTER, PEFT, WEIGHTS
from .pictures import shown
from .sampling import Sampling

__all__ = ["class_name", "plain_use", "write_card"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
STUDENTS = {  # the schedule that a student was told to take
    "lcm": "diffusers.LCMScheduler.from_config(pipe.scheduler.config)",
    "trailing": "diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing='trailing')",
}
SHIFTS = "HyperNoise"  # the objective whose adapters are no part of the sampler


def write_card(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes README.md into a run's folder, whole or not at all.

    Args:
        result: as in `result.json`, where what is not finite is None.
    """
    parts = [_front(folder, result), _opening(folder, result), _warnings(result), _table(result)]
    parts += [_use(folder, result), _end(folder, result)]
    partial = folder / "README.md.partial"
    partial.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    partial.replace(folder / "README.md")


def plain_use(policy: Policy, sampling: Sampling, prompt: Prompt) -> dict[str, Any]:
    """How the model's own pipeline makes what a run samples: "call", arguments beside the prompt, and "absent", the parts to load
    as None; nothing for a model that has no pipeline, or shows it pictures."""
    pipe: Any = getattr(policy, "pipe", None)
    if pipe is None or getattr(policy, "controlled", False):
        return {}
    x, steps = torch.zeros(1, *sampling.shape), sampling.levels.steps
    asked = policy.published([prompt], sampling.guidance, steps, sampling.size, x)  # pyright: ignore
    firsts = {name: value[0] if isinstance(value, list) else value for name, value in asked.items() if name != "prompt"}
    call = {name: value for name, value in firsts.items() if isinstance(value, (bool, int, float, str))}
    optional = pipe._optional_components
    return {"call": call, "absent": [n for n, part in pipe.components.items() if part is None and n not in optional]}


def class_name(component: Any) -> str:
    """The class of a described component."""
    return (
        component["class_path"].rpartition(".")[2]
        if isinstance(component, Mapping) and "class_path" in component
        else ""
    )


def _base(result: Mapping[str, Any]) -> str:
    policy = result["config"].get("policy")
    return str(policy.get("model", "")) if isinstance(policy, Mapping) else ""


def _has_lora(folder: Path) -> bool:
    return (folder / ADAPTER).is_file() or (folder / PEFT).is_file()


def _front(folder: Path, result: Mapping[str, Any]) -> str:
    """What the hub reads. A base model that is a folder has no name there."""
    import yaml

    base, objective = _base(result), class_name(result["config"].get("objective"))
    front: dict[str, Any] = {}
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        front |= {"base_model": base}
    front["library_name"] = "diffusers"
    if (folder / "samples").is_dir():
        front["pipeline_tag"] = "text-to-image"
    tags = ["lora"] if _has_lora(folder) else []
    front["tags"] = [*tags, "kilter", *([objective] if objective else [])]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _opening(folder: Path, result: Mapping[str, Any]) -> str:
    """What this is and what it was trained for."""
    config = result["config"]
    objective, source, reward = (class_name(config.get(part)) for part in ("objective", "source", "reward"))
    what = "LoRA adapter" if _has_lora(folder) else "Weights"
    goal = f"to raise the reward `{reward}`" if reward else "on human feedback"
    lines = [
        f"# {objective or 'Training'} on {reward or source or 'data'}",
        "",
        f"{what} for `{_base(result) or class_name(config.get('policy')) or 'a policy'}`, trained with `{objective}` on `{source}` "
        f"{goal}, by kilter, for {result['updates']} updates.",
    ]
    if result["evaluations"]:
        lines[-1] += (
            f" These are the weights after update {result['best']}, where the judge `{result['judge']}` was highest."
        )
    if (folder / "before_after.png").is_file():
        lines += ["", "![Samples before and after training, from the same prompts and seeds](before_after.png)"]
    return "\n".join(lines)


def _warnings(result: Mapping[str, Any]) -> str:
    told = []
    if result["over_optimised"]:
        updates = ", ".join(map(str, result["over_optimised"]))
        told.append(
            f"> **Over-optimisation was noticed** at update {updates}: `{result['optimised']}` had risen while the held-out "
            f"`{result['judge']}` had fallen below its best, each by more than two standard errors. The weights here are those of "
            f"update {result['best']}; a smaller LoRA scale is milder still."
        )
    if result["stopped"]:
        told.append(f"> The run ended early: {' '.join(str(result['stopped']).split())}")
    return "\n\n".join(told)


def _table(result: Mapping[str, Any]) -> str:
    """Before, after, and the paired gain of each reward; then KL and diversity."""
    evaluations = result["evaluations"]
    if not evaluations:
        return "## Results\n\nThe run ended before its first evaluation."
    before = evaluations[0]
    after = next((e for e in evaluations if e["update"] == result["best"]), before)
    lines = [
        "## Results",
        "",
        f"| | update {before['update']} | update {after['update']} | paired gain |",
        "|---|--:|--:|--:|",
    ]
    for name, (gain, error) in after["gains"].items():
        roles = [role for role, of in (("optimised", result["optimised"]), ("judge", result["judge"])) if of == name]
        label = f"`{name}`" + (f" ({', '.join(roles)})" if roles else "")
        moved = "–" if after is before else f"{_signed(gain)} ± {_number(error)}"
        lines.append(f"| {label} | {_number(before['means'][name])} | {_number(after['means'][name])} | {moved} |")
    for label, key in (("KL from the reference, nats a sample", "kl"), ("diversity, distance a pixel", "diversity")):
        lines.append(f"| {label} | {_number(before['means'][key])} | {_number(after['means'][key])} | |")
    lines += [
        "",
        f"{len(result['prompts'])} prompts, {result['samples']} samples each, same seeds throughout; ± is one standard error over "
        "prompts. The judge chose the update on these very prompts, so its own gain is slightly flattered.",
    ]
    return "\n".join(lines)


def _use(folder: Path, result: Mapping[str, Any]) -> str:
    """How to sample with the weights, in diffusers and in kilter."""
    base = _base(result)
    if not base:
        return ""
    prompt = " ".join(str((result["prompts"] or ["a prompt"])[0]).split())
    how = result["config"]["train"]["init_args"]
    words = ["kilter", "steer", prompt, "--model", base, "--lora", str(folder)]
    student = result["config"]["policy"].get("student")
    words += [f"--student={student}"] if student else []
    words += [f"--{name}={how[name]}" for name in ("steps", "guidance") if how.get(name) is not None]
    if class_name(result["config"].get("objective")) == SHIFTS:
        intro = "The adapter moves the initial noise, and the model without it makes the image:"
        return "\n".join(["## Use", "", intro, "", "```sh", shlex.join([*words, "--steering=ShiftedNoise"]), "```"])
    lines = ["## Use", "", "```python", "from diffusers import DiffusionPipeline", ""]
    known = result.get("pipeline") or {}
    absent = "".join(f", {name}=None" for name in known.get("absent", ()))
    lines.append(f"pipe = DiffusionPipeline.from_pretrained({base!r}{absent})")
    if (folder / ADAPTER).is_file():
        lines.append(f"pipe.load_lora_weights({str(folder)!r})")
    elif (folder / PEFT).is_file():
        lines.insert(4, "from peft import PeftModel")
        lines.append(f"pipe.transformer = PeftModel.from_pretrained(pipe.transformer, {str(folder)!r})")
    else:
        lines.insert(4, "from safetensors.torch import load_file")
        lines.append('network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer')
        lines.append(f"network.load_state_dict(load_file({str(folder / WEIGHTS)!r}), strict=False)")
    if student:
        lines.insert(3, "import diffusers")
        lines.append(f"pipe.scheduler = {STUDENTS[student]}")
    said = known.get("call") or {"num_inference_steps": how.get("steps"), "guidance_scale": how.get("guidance")}
    given = "".join(f", {name}={value!r}" for name, value in said.items() if value is not None)
    lines += [f"image = pipe({prompt!r}{given}).images[0]", "```"]
    if _has_lora(folder):
        lines += ["", "Or steer on top of it:", "", "```sh", shlex.join(words), "```"]
    return "\n".join(lines)


def _end(folder: Path, result: Mapping[str, Any]) -> str:
    import yaml

    lines = ["## How it was trained", ""]
    if (folder / "curves.png").is_file():
        lines += ["![Rewards, divergence and diversity against updates](curves.png)", ""]
    ledger = result["ledger"]
    lines += [
        f"{ledger['network_evaluations']:,} network evaluations, recomputation included, and {ledger['reward_calls']:,} reward "
        f"calls in {shown(result['seconds'])} seconds of updates.",
        "",
        "<details><summary>Configuration</summary>",
        "",
        "```yaml",
        yaml.safe_dump(
            json.loads(json.dumps(result["config"], default=str)), sort_keys=False, allow_unicode=True, width=100
        ).strip(),
        "```",
        "",
        "</details>",
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else shown(value)


def _signed(value: float | None) -> str:
    return "–" if value is None else ("+" if value >= 0 else "") + shown(value)
