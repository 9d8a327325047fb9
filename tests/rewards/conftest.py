from pathlib import Path

import pytest

from tests.rewards import tiny, tiny_vlm


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_siglip(tmp_path_factory.mktemp("siglip")))


@pytest.fixture(scope="session")
def siglip2_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_siglip2(tmp_path_factory.mktemp("siglip2")))


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_open_clip(tmp_path_factory.mktemp("open_clip"))


@pytest.fixture(scope="session")
def aesthetic_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_aesthetic(tmp_path_factory.mktemp("aesthetic") / "head.pth")


@pytest.fixture(scope="session")
def vlm_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Vision-language models by their type; three of them are Qwens."""
    folder = tmp_path_factory.mktemp("vlm")
    return {
        "qwen2_vl": tiny_vlm.save_qwen2_vl(folder / "2"),
        "qwen2_5_vl": tiny_vlm.save_qwen2_5_vl(folder / "2.5"),
        "qwen3_vl": tiny_vlm.save_qwen3_vl(folder / "3"),
        "llava_onevision": tiny_vlm.save_llava_onevision(folder / "llava"),
    }
