"""Laws of checkpoints: whole or not at all, whatever fails and whenever; readable; nothing of the process is forgotten."""

from __future__ import annotations

import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from align import checkpoints
from align.checkpoints import complete, latest, never_saved, read, remove, tidy, write
from align.world import World
from tests.align.runs import world_of

WORLD = World(cpu=True)
STATE = {"weights": {"a": torch.arange(3.0)}, "counters": {"update": 3}, "none": None, "names": ["x", ("y", 2)]}


def save(
    folder: Path, value: int = 0, config: dict | None = None, extra=lambda folder: [], world: World = WORLD
) -> Path:
    write(folder, {"processes": 1, **(config or {})}, {**STATE, "value": value}, {"mine": value}, extra, world)
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_written_is_read(tmp_path):
    def adapter(folder: Path) -> list[Path]:
        (folder / "adapter").write_text("weights")
        return [folder / "adapter"]

    folder = save(tmp_path / "run" / "checkpoints" / "000003", 7, {"description": {"seed": 1}}, adapter)
    config, state, shards = read(folder)
    assert config == {"processes": 1, "description": {"seed": 1}}
    torch.testing.assert_close(state["weights"], STATE["weights"], rtol=0, atol=0)
    assert (state["value"], state["counters"], state["none"], state["names"]) == (
        7,
        {"update": 3},
        None,
        ["x", ("y", 2)],
    )
    assert shards == [{"mine": 7}]
    assert (folder / "adapter").read_text() == "weights"
    assert [p.name for p in folder.parent.iterdir()] == ["000003"]


@pytest.mark.parametrize("call", range(9))
@pytest.mark.parametrize("older", [True, False])
def test_a_failure_at_any_moment_leaves_the_older_one(tmp_path, monkeypatch, call, older):
    """The call-th operation on the disk fails, whichever it is: making a folder, writing, flushing or renaming."""
    folder = tmp_path / "000003"
    if older:
        save(folder, 1)
    before, calls = everything(tmp_path), []

    def failing(operation):
        def tried(*args, **how):
            calls.append(0)
            if len(calls) == call + 1:
                raise OSError(28, "No space left on device")
            return operation(*args, **how)

        return tried

    monkeypatch.setattr(Path, "mkdir", failing(Path.mkdir))
    monkeypatch.setattr(checkpoints.torch, "save", failing(torch.save))
    monkeypatch.setattr(Path, "write_text", failing(Path.write_text))
    monkeypatch.setattr(checkpoints, "flush", failing(checkpoints.flush))
    with pytest.raises(OSError, match=r"could not write checkpoint .*000003: .*No space left"):
        save(folder, 2)
    monkeypatch.undo()
    if call < 8:
        assert everything(tmp_path) == before
    else:  # all is written, but the folder above could not be flushed
        assert read(folder)[1]["value"] == 2
    assert read(save(folder, 3))[1]["value"] == 3


def test_a_write_that_the_system_refuses(tmp_path):
    """Not a mock: files may not grow beyond a limit, as on a full disk. Torch's writer, JSON and safetensors all meet it."""
    from safetensors.torch import save_file

    folder = save(tmp_path / "000003", 1)
    big = {"a": torch.zeros(100_000)}

    def tensors(folder: Path) -> list[Path]:
        save_file(big, folder / "adapter.safetensors")
        return [folder / "adapter.safetensors"]

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    attempts = [({"a": "x" * 100_000}, STATE, lambda f: []), ({}, {**STATE, **big}, lambda f: []), ({}, STATE, tensors)]
    for config, state, extra in attempts:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
            with pytest.raises(OSError, match="could not write checkpoint"):
                write(folder, {"processes": 1, **config}, state, {}, extra, WORLD)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert read(folder)[1]["value"] == 1
        assert [p.name for p in tmp_path.iterdir()] == ["000003"]


def test_a_failure_elsewhere_is_a_failure_here(tmp_path):
    """What one process cannot write, none keeps."""
    world = world_of(0, 2)
    answers = iter([False, True])
    world.any = lambda flag: flag or next(answers)
    with pytest.raises(OSError, match="another process failed"):
        save(tmp_path / "000001", world=world)
    assert list(tmp_path.iterdir()) == []


def test_cut_off_while_one_replaces_another(tmp_path):
    """Between the two renames the older one still counts, and a new one takes its place."""
    run = tmp_path
    save(run / "checkpoints" / "000002", 2)
    save(run / "checkpoints" / "000003", 3)
    (run / "checkpoints" / "000003").rename(run / "checkpoints" / "000003.old")
    assert latest(run).name == "000003.old"
    assert read(latest(run))[1]["value"] == 3
    tidy(run, 3)
    assert latest(run).name == "000003.old"
    save(run / "checkpoints" / "000003", 4)
    assert (latest(run).name, read(latest(run))[1]["value"]) == ("000003", 4)
    tidy(run, 3)
    assert [p.name for p in complete(run)] == ["000002", "000003"]


def test_the_latest_is_that_of_the_highest_update(tmp_path):
    for update in (9, 999_999, 1_000_000, 25):
        save(tmp_path / "checkpoints" / f"{update:06d}")
    for distraction in (".partial-2000000", "3000000", "notes"):
        (tmp_path / "checkpoints" / distraction).mkdir()
    assert latest(tmp_path).name == "1000000"
    assert [int(p.name) for p in complete(tmp_path)] == [9, 25, 999_999, 1_000_000]
    assert latest(tmp_path / "checkpoints" / "000025").name == "000025"
    tidy(tmp_path, 25)
    assert [p.name for p in complete(tmp_path)] == ["000009", "000025"]
    remove(tmp_path / "checkpoints" / "000025")
    assert latest(tmp_path).name == "000009"


def test_a_run_that_never_saved(tmp_path):
    assert not never_saved(tmp_path / "absent")
    assert not never_saved(tmp_path)
    (tmp_path / "checkpoints" / ".partial-000001").mkdir(parents=True)
    assert never_saved(tmp_path)
    save(tmp_path / "checkpoints" / "000001")
    assert not never_saved(tmp_path)


@pytest.mark.parametrize("file", ["state.pt", "config.json", "rank-00000.pt"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_what_cannot_be_read_is_named(tmp_path, file, damage):
    folder = save(tmp_path / "000001")
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage != "missing":
        noise = random.Random(0).randbytes(len(content))
        (folder / file).write_bytes({"empty": b"", "cut": content[: len(content) // 2], "noise": noise}[damage])
    with pytest.raises(ValueError, match=r"checkpoint .*000001 cannot be read .*: resume from an older one"):
        read(folder)


def test_loading_runs_no_code(tmp_path):
    folder = save(tmp_path / "000001")

    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('boom')",))

    torch.save({"weights": Bomb()}, folder / "state.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        read(folder)


def test_every_generator_goes_on():
    def draw() -> list[float]:
        return [torch.rand(()).item(), random.random(), float(np.random.rand()), float(np.random.randn())]

    np.random.randn()  # numpy keeps the second of two normal numbers back
    before = checkpoints.generators()
    first = draw()
    second = draw()
    checkpoints.restore_generators(before)
    assert draw() == first
    assert draw() == second != first


def test_generators_survive_the_file(tmp_path):
    state = checkpoints.generators()
    expected = [torch.rand(()).item(), random.random(), float(np.random.randn())]
    torch.save(state, tmp_path / "g.pt")
    checkpoints.restore_generators(torch.load(tmp_path / "g.pt", weights_only=True))
    assert [torch.rand(()).item(), random.random(), float(np.random.randn())] == expected
