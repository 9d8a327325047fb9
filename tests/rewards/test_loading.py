"""Strict loading: every key of a checkpoint is accounted for, nothing executable is read."""

from __future__ import annotations

import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rewards
from rewards import CLIPScore, LocalJudge
from rewards.loading import fill, find, loading, pretrained, pretrained_tokenizer, read_weights
from rewards.preprocess import pretrained_preprocess
from tests.rewards import tiny


def test_weights_are_read_from_either_kind_of_file(tmp_path) -> None:
    weights = {"weight": torch.arange(6.0).view(2, 3)}
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "b.pt")
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "c.pt")
    for name in ("a.safetensors", "b.pt", "c.pt"):
        assert torch.equal(read_weights(tmp_path / name)["weight"], weights["weight"])


def test_code_in_a_pickle_is_not_run(tmp_path) -> None:
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    (tmp_path / "a.pt").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(pickle.UnpicklingError):
        read_weights(tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(ValueError, match="holds no state dict, but list"):
        read_weights(tmp_path / "b.pt")


def test_code_beside_a_checkpoint_is_neither_run_nor_asked_about(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked at the terminal"))
    for name, kind in {"config.json": "AutoConfig", "preprocessor_config.json": "AutoImageProcessor"}.items():
        (tmp_path / name).write_text(json.dumps({"model_type": "mine", "auto_map": {kind: "mine.Mine"}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}))
    (tmp_path / "mine.py").write_text("raise SystemExit('code of a checkpoint ran')")
    for load in (CLIPScore, LocalJudge, pretrained_tokenizer, lambda name: pretrained_preprocess(name, "none")):
        with pytest.raises(OSError, match=r"contains custom code|Unrecognized processing class"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "found"),
    {"a.pth": r"a file of 4 bytes\. If a download", "b.pth": r"no such folder or file\. Correct"}.items(),
)
def test_an_error_says_what_is_on_disk(tmp_path, name: str, found: str) -> None:
    (tmp_path / "a.pth").write_bytes(b"torn")
    with (
        pytest.raises(OSError, match=rf"Needed: the head\. Found: .*{found}"),
        loading(str(tmp_path / name), "the head"),
    ):
        read_weights(find(str(tmp_path / name)))


def test_keys_that_do_not_fit_are_all_listed() -> None:
    weights = {"weight": torch.zeros(2, 2), "extra": torch.zeros(1), "queue.1": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"lacks bias; has unknown extra; differs in shape at weight \(2, 2\) for \(2, 3\)"
    ):
        fill(nn.Linear(3, 2), weights, "a.pt", ignore=[r"queue\..*"])
    layer = nn.Linear(3, 2)
    fill(layer, {"weight": torch.ones(2, 3), "bias": torch.ones(2), "queue.1": torch.zeros(1)}, "a", [r"queue\..*"])
    assert layer.weight.sum() == 6


def test_a_checkpoint_of_transformers_must_fill_the_network(tmp_path) -> None:
    from transformers import CLIPModel

    folder = tiny.save_clip(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    ids = torch.arange(12)[None]  # a buffer that older releases saved
    save_file({**weights, "text_model.embeddings.position_ids": ids}, folder / "model.safetensors", {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CLIPScore(str(folder))
    save_file({**weights, "head.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"weights that CLIPModel does not read: head\.weight"):
        pretrained(CLIPModel, str(folder))
    weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(OSError, match=r"the weights lack visual_projection\.weight"):
        CLIPScore(str(folder))


def test_a_file_is_found_on_disk_first_and_a_name_that_is_none_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.pt").touch()
    assert find("a/b/c.pt").is_file()
    with pytest.raises(FileNotFoundError, match="does not read owner/name/file"):
        find("c.pt")


NETWORKS = (
    rewards.Aesthetic,
    rewards.CLIPFlanT5,
    rewards.CLIPScore,
    rewards.EvalMuse,
    rewards.GenEval,
    rewards.HPSv3,
    rewards.ImageReward,
    rewards.LocalJudge,
    rewards.MMRLHFJudge,
    rewards.MPS,
    rewards.Safety,
    rewards.SafetyChecker,
    rewards.ShadowAesthetic,
    rewards.XComposerReward,
)


@pytest.mark.parametrize("cls", NETWORKS)
def test_an_unknown_precision_is_refused_before_anything_is_loaded(cls) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of float.*; got 'bf16'"):
        cls(dtype="bf16")
