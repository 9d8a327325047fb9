"""Where the networks of a pipeline live and how they are stored: quantised, offloaded, on several devices, compiled.

**Quantised** (`quantize`): the linear layers of the denoising network keep few bits, by diffusers' own configurations, and are
frozen. A LoRA over them is float32 (QLoRA, 2305.14314). "int8" and "fp8" are torchao's weight-only types, on the CPU too; "nf4"
is bitsandbytes', on a GPU. (torchao's int4 is left out: peft puts no LoRA over it.)

**Offloaded** (`offload`): weights wait on the CPU and come to the GPU to compute, by the hooks of diffusers and accelerate.
"group" brings a layer at a time, ahead of its use; "model" a network at a time; "sequential" a layer at a time when it is used.
What autograd has kept of a weight may be gone when the backward pass comes, so wherever a gradient is wanted, network calls and
decoding are recomputed there, which brings the weights again. That works where a layer's weights are new tensors every time
("sequential") or stay until another network's turn ("model"), and not with "group", which moves the data of one tensor to and
fro: autograd would find it on the CPU. A model is trained with "sequential" alone: its adapter stays on the GPU, where "model"
carries it along in the middle of a backward pass.

**Several devices** (`device_map`): whole networks are spread by diffusers, as "balanced" does.

**Compiled** (`compile`): in place, so names in `state_dict` and adapters stay. "regional" compiles the network's repeated block
once. With and without a gradient are two programs, which generated code may round differently: ratios of log-probabilities are
then one but for that.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from samplers import Policy

__all__ = ["Offload", "Placement", "Quantize", "check_trainable", "gathered", "offload"]

Quantize = Literal["int8", "nf4", "fp8"]
Offload = Literal["model", "group", "sequential"]
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes", "fp8": "torchao"}


@dataclass(frozen=True)
class Placement:
    """Where and how the networks of a pipeline are kept; see the module's docstring.

    Attributes:
        quantize: bits of the denoising network's frozen linear layers.
        quantize_text: the same for the text encoders.
        device_map: "balanced" over all GPUs.
        offload: what brings weights from the CPU when they are needed.
        compile: the network as a whole, or its repeated block.
    """

    quantize: Quantize | None = None
    quantize_text: bool = False
    device_map: str | None = None
    offload: Offload | None = None
    compile: bool | Literal["regional"] = False

    def __post_init__(self) -> None:
        if self.quantize not in (None, *PACKAGES):
            raise ValueError(f"quantize must be one of {', '.join(PACKAGES)}; got {self.quantize!r}")
        if self.offload not in (None, "model", "group", "sequential"):
            raise ValueError(f"offload must be model, group or sequential; got {self.offload!r}")
        if self.compile not in (True, False, "regional"):
            raise ValueError(f"compile must be true, false or regional; got {self.compile!r}")
        if self.quantize_text and self.quantize is None:
            raise ValueError("quantize_text says that text encoders are quantised too: set quantize")
        if self.offload and self.device_map:
            raise ValueError("device_map keeps weights where they compute, offload does not: choose one")
        if self.offload and self.compile:
            raise ValueError(f"offload={self.offload!r} moves the weights a compiled network would hold: choose one")
        if self.offload == "sequential" and self.quantize:
            raise ValueError("offload='sequential' takes quantised weights apart: use offload='group' or 'model'")

    def check(self, device: torch.device, waiting: bool) -> None:
        """Raises before anything is read if this cannot be had here.

        Raises:
            ValueError: it needs a GPU, a package, or processes that do not share the network.
        """
        said = ", ".join(f"{name}={value!r}" for name, value in self.as_dict().items())
        if waiting and (self.quantize or self.offload or self.device_map):
            raise ValueError(f"{said} and FSDP both say where weights live: launch without FSDP, or leave it out")
        if device.type == "meta":
            return
        if self.offload and device.type == "cpu":
            raise ValueError(f"offload={self.offload!r} brings weights from the CPU to a GPU, and this runs on the CPU")
        if self.device_map and (self.device_map not in ("balanced", device.type) or device.type == "cpu"):
            raise ValueError(f"device_map must be balanced, over GPUs; got {self.device_map!r} on {device.type}")
        if self.quantize is None:
            return
        if self.quantize == "nf4" and device.type == "cpu":
            raise ValueError(f"quantize={self.quantize!r} needs a GPU; on the CPU there are int8 and fp8")
        package = PACKAGES[self.quantize]
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"quantize={self.quantize!r} needs {package}: pip install 'kilter[quant]'")

    def as_dict(self) -> dict[str, Any]:
        """What differs from the defaults."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {f.name: given[f.name] for f in fields(self) if given[f.name] != f.default}

    def reading(self, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of `from_pretrained` for the pipeline that `index` describes."""
        how: dict[str, Any] = {} if self.device_map is None else {"device_map": self.device_map}
        if self.quantize is None:
            return how
        from diffusers import PipelineQuantizationConfig

        networks = [name for name in ("unet", "transformer") if name in index]
        encoders = [n for n, e in index.items() if n.startswith("text_encoder") and e != [None, None]]
        mapping = {name: self._config("diffusers", dtype) for name in networks}
        if self.quantize_text:
            mapping |= {name: self._config("transformers", dtype) for name in encoders}
        return how | {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}

    def _config(self, library: str, dtype: torch.dtype) -> Any:
        module: Any = importlib.import_module(library)
        if self.quantize == "nf4":
            return module.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=True,
            )
        types: Any = importlib.import_module("torchao.quantization")
        kinds = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
        return module.TorchAoConfig(getattr(types, kinds[str(self.quantize)])())

    def settle(self, policy: Policy, device: torch.device) -> None:
        """Installs offloading and compiles; the pipeline is loaded, and on its devices where nothing is offloaded."""
        if self.offload:
            offload(policy, self.offload, device)
        network: Any = policy.network
        if self.compile == "regional":
            if not getattr(network, "_repeated_blocks", None):
                raise ValueError(f"{type(network).__name__} names no repeated blocks: use compile=true")
            network.compile_repeated_blocks()
        elif self.compile:
            network.compile()


def offload(policy: Policy, how: Offload, device: torch.device) -> None:
    """Lets the networks of a policy wait on the CPU and compute on `device`."""
    from diffusers.hooks import apply_group_offloading

    pipe: Any = policy.pipe
    policy.runs_on = device
    if how == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif how == "sequential":
        with _without_adapters(policy.network):
            pipe.enable_sequential_cpu_offload(device=device)
        for _, _, adapter in _adapters(policy.network):
            adapter.to(device)
    else:
        for part in (p for p in pipe.components.values() if isinstance(p, nn.Module)):
            ahead = (
                part is policy.network and device.type == "cuda"
            )  # in the order of its calls, which `forward` begins
            apply_group_offloading(part, device, offload_type="leaf_level", use_stream=ahead)
    if policy.preview_vae is not None:  # pyright: ignore[reportAttributeAccessIssue]
        policy.preview_vae.to(device)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Weights that sequential offloading took from the network back in it, so that an adapter can be put on it."""
    apart = policy.loaded_with.get("offload") == "sequential"
    if apart:
        policy.pipe.remove_all_hooks()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    yield
    if apart:
        assert policy.runs_on is not None
        offload(policy, "sequential", policy.runs_on)


def check_trainable(policy: Policy, whole: bool) -> None:
    """Raises if the way a policy is kept does not let it be trained.

    Args:
        whole: whether all its weights are to be trained.

    Raises:
        ValueError: so it is.
    """
    how = policy.loaded_with
    if how.get("offload") == "model":
        raise ValueError(
            "offload='model' moves weights in the middle of a backward pass, those being trained too: use offload='sequential', "
            "or quantize"
        )
    if how.get("offload") == "group":
        raise ValueError("no gradient passes through offload='group': use offload='sequential', or quantize")
    if how.get("offload") and whole:
        raise ValueError(
            "all weights are to be trained, but offload keeps them on the CPU: train a LoRA (lora: {rank: 8})"
        )
    if how.get("quantize") and whole:
        raise ValueError(f"weights in {how['quantize']} are frozen: train a LoRA over them (lora: {{rank: 8}})")


def _adapters(network: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The modules that adapters put beside layers: (adapted layer, name, module)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    return [(la, n, la._modules[n]) for la in layers for n in la.adapter_layer_names if la._modules.get(n) is not None]  # pyright: ignore


@contextmanager
def _without_adapters(network: nn.Module) -> Iterator[None]:
    """The network with its adapters out of sight: what is trained does not move."""
    hidden = _adapters(network)
    try:
        for layer, name, _ in hidden:
            del layer._modules[name]
        yield
    finally:
        for layer, name, adapter in hidden:
            layer._modules[name] = adapter
