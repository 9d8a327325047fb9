from pathlib import Path

import pytest

from tests.rewards import tiny


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
