"""Rewards learned from people of known tastes: how good they can be, that fits go on bit for bit, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import align
from align.cli import main
from align.data import read_feedback
from align.learning import (
    MLP,
    PAL,
    VPL,
    BradleyTerry,
    Distributional,
    FitConfig,
    Loss,
    PlackettLuce,
    RaoKupper,
    adapt,
    adapt_reward,
    train_reward,
)
from align.learning.data import compare, split
from align.learning.encodings import pixels
from benchmarks import tastes
from rewards import Brightness, CLIPScore, CrossEncoder, FrameDifference, Prompt, Standardised
from rewards.learned import Learned
from rewards.shapes import detect
from samplers import BestOfN
from tests.align.learning.conftest import PEOPLE, World

QUICK: dict[str, Any] = {
    "batch": 3,
    "holdout": 0.2,
    "epochs": 25,
    "patience": 6,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="session")
def alike(world: World, clip: CLIPScore, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("alike")
    return train_reward(world.train, clip, heldout=world.held, cache=world.cache, config=FitConfig(**QUICK), out=out)


@pytest.fixture(scope="session")
def pal(world: World, clip: CLIPScore, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("pal")
    return train_reward(
        world.train, clip, head=PAL(width=32), heldout=world.held, cache=world.cache, config=FitConfig(**QUICK), out=out
    )


@pytest.fixture(scope="session")
def vpl(world: World, clip: CLIPScore, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("vpl")
    head, config = VPL(latent=8, hidden=48), FitConfig(**QUICK | {"epochs": 50, "patience": 40})
    return train_reward(world.train, clip, head=head, heldout=world.held, cache=world.cache, config=config, out=out)


def test_one_taste_for_all_is_bounded_by_the_mixture(world: World, alike):
    """It does no better than the mixture of tastes allows, within 3 standard errors, and it gets most of that."""
    bound = tastes.bounds(world.judged, {"red": 0.5, "blue": 0.5})
    assert bound.accuracy < 0.62
    assert alike.report["accuracy"] < bound.accuracy + 3 * bound.error
    assert alike.report["nll_calibrated"] > bound.nll - 0.01
    assert alike.report["accuracy"] > 0.5 + (bound.accuracy - 0.5) / 2


@pytest.mark.parametrize("which", ["pal", "vpl"])
def test_knowing_the_person_gains_what_the_mixture_hides(
    which: str, world: World, alike, request: pytest.FixtureRequest
):
    """Accuracy lies within 3 standard errors of the best possible, which is far beyond what one taste for all can reach."""
    report = request.getfixturevalue(which).report
    blind, aware = tastes.bounds(world.judged, {"red": 0.5, "blue": 0.5}), tastes.bounds(world.judged)
    assert aware.accuracy - blind.accuracy > 0.2
    assert abs(report["accuracy"] - aware.accuracy) < 3 * aware.error
    assert report["accuracy"] - alike.report["accuracy"] > aware.accuracy - blind.accuracy - 3 * 2**0.5 * aware.error
    assert report["nll_calibrated"] < blind.nll


@pytest.mark.parametrize("which", ["pal", "vpl"])
def test_a_new_person_is_known_from_a_few_pairs(
    which: str, world: World, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    folder = request.getfixturevalue(which).folder
    newcomers = {"new-red": "red", "new-blue": "blue"}
    few = tastes.judged(
        world.folder, f"few-{which}.jsonl", newcomers, 12, world.made, tastes.PREFIXES[:1], ("a",), seed=3
    )
    adapted = adapt_reward(folder, few, out=tmp_path / "adapted")
    before, after = tensors(folder), tensors(adapted)
    assert all(torch.equal(before[k], after[k]) for k in before if k != "codes")
    assert json.loads((adapted / "config.json").read_text())["users"] == [*PEOPLE, *newcomers]
    red, blue = (shown(world, color) for color in ("red", "blue"))
    for user, sign in (("new-red", 1), ("new-blue", -1), ("red-0", 1), ("blue-0", -1)):
        reward = Learned(str(adapted), user=user)
        lead = reward(red, ["a square"]).mean() - reward(blue, ["a square"]).mean()
        assert sign * lead > 0.5, user
    average = Learned(str(adapted))
    raw = average.head(average.reference, average.codes_of(torch.zeros(len(average.reference.joint), dtype=torch.long)))
    assert float(((raw.mean - average.mean[:, :1]) / average.std[:, :1]).mean()) == pytest.approx(0, abs=1e-4)
    assert torch.equal(
        Learned(str(adapted), user="red-0")(red, ["a star"]),
        Learned(str(folder), user="red-0")(red, ["a star"]),
    )
    with pytest.raises(ValueError, match="new to"):
        adapt_reward(adapted, few, out=tmp_path / "again")
    encoded: list[int] = []
    monkeypatch.setattr(adapt, "encode", lambda encoder, samples, **how: encoded.append(len(samples)))
    with pytest.raises(FileExistsError):  # before anything is encoded
        adapt_reward(folder, few, out=adapted)
    assert not encoded


def shown(world: World, color: str) -> torch.Tensor:
    """The square of a colour."""
    rows = compare(read_feedback(world.train, "preferences").records).samples
    by_name = {Path(s.media.name).name: s for s in rows}
    return torch.stack([pixels(by_name[Path(name).name]) for name in world.made["square", color]])


def test_a_run_cut_off_goes_on_to_the_same_bits(world: World, clip: CLIPScore, tmp_path: Path):
    class CutOff(BradleyTerry):
        """Stops at a step, as if the process had been killed."""

        steps = 0

        def terms(self, data, raw):
            CutOff.steps += 1
            if CutOff.steps == 17:
                raise KeyboardInterrupt
            return super().terms(data, raw)

    def run(out: Path):
        config = FitConfig(batch=3, epochs=6, save_seconds=0, bootstrap=True)
        return train_reward(
            world.train,
            clip,
            head=MLP(hidden=(8,), members=2),
            loss=CutOff(),
            heldout=world.held,
            cache=world.cache,
            config=config,
            out=out,
        )

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"asked.json", "fit.pt"}
    with pytest.raises(FileExistsError, match="another run that was cut off"):
        train_reward(world.train, clip, heldout=world.held, out=tmp_path / "a")
    resumed, whole = run(tmp_path / "a"), run(tmp_path / "b")
    one, other = tensors(resumed.folder), tensors(whole.folder)
    assert all(torch.equal(one[k], other[k]) for k in other)
    assert resumed.report == whole.report
    assert {p.name for p in resumed.folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "report.json",
        "report.png",
    }
    with pytest.raises(FileExistsError, match="not empty"):
        run(tmp_path / "a")


def test_prompts_are_held_out_whole(world: World):
    data = compare(read_feedback(world.train, "preferences").records)
    train, held = split(data, 0.25, seed=0)
    assert len(held.prompt.unique()) == 5
    assert not set(train.prompt.tolist()) & set(held.prompt.tolist())
    assert len(train) + len(held) == len(data) and len(train.pair) + len(held.pair) == len(data.pair)
    for part in (train, held):  # rows were renumbered, not mixed
        assert bool((part.record[part.first] == part.pair).all()) and bool(
            (part.record[part.second] == part.pair).all()
        )
    with pytest.raises(ValueError, match="cannot be held out"):
        split(train.of_prompts(train.prompt[:1]), 0.5, 0)


@pytest.mark.parametrize(
    ("head", "loss"),
    [
        (MLP(hidden=(16,)), PlackettLuce()),
        (MLP(hidden=(16,)), RaoKupper(1.5)),
        (MLP(hidden=(16,), variance=True), Distributional()),
        (PAL(width=16, kind="angle", by_prompt=True), BradleyTerry(smoothing=0.05)),
    ],
    ids=lambda part: type(part).__name__,
)
def test_every_loss_learns_what_all_agree_on(head, loss: Loss, world: World, clip: CLIPScore, tmp_path: Path):
    """Everybody prefers yellow to black."""
    config = FitConfig(**QUICK | {"epochs": 8, "balance": "user"})
    folder = train_reward(
        world.train,
        clip,
        head=head,
        loss=loss,
        heldout=world.held,
        cache=world.cache,
        config=config,
        out=tmp_path / "r",
    ).folder
    reward = Learned(str(folder))
    yellow, black = (reward(shown(world, color), ["a square"]).mean() for color in ("yellow", "black"))
    assert yellow > black


def test_a_lora_is_trained_on_a_copy_and_read_back(world: World, clip: CLIPScore, tmp_path: Path):
    few = tastes.judged(
        world.folder, "lora.jsonl", {"red-0": "red"}, 24, world.made, tastes.PREFIXES[:1], ("a",), seed=4
    )
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    config = FitConfig(batch=4, epochs=2, lora=2, holdout=0.2, learning_rate=1e-2)
    folder = train_reward(few, clip, head=MLP(hidden=()), config=config, out=tmp_path / "lora").folder
    assert all(torch.equal(v, clip.state_dict()[k]) for k, v in before.items())
    adapters = {k: v for k, v in tensors(folder).items() if "lora_B" in k}
    assert (
        adapters
        and all("vis" in k.partition("encoder.model.")[2][:6] for k in adapters)
        and any(v.abs().max() > 0 for v in adapters.values())
    )
    red, reward = shown(world, "red"), Learned(str(folder))
    report = json.loads((folder / "report.json").read_text())
    assert report["pairs"] and torch.isfinite(reward(red, ["a square"])).all()
    save_file({k: v for k, v in tensors(folder).items() if "lora_B" not in k}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="adapters"):
        Learned(str(folder))


def test_what_cannot_be_learned_is_refused_before_any_work(world: World, clip: CLIPScore, tmp_path: Path):
    with pytest.raises(ValueError, match="says how sure"):
        train_reward(world.train, clip, loss=Distributional(), out=tmp_path / "a")
    with pytest.raises(TypeError, match="no features"):
        train_reward(world.train, Brightness(), out=tmp_path / "b")
    with pytest.raises(ValueError, match="gold must score each picture by itself; FrameDifference looks at video"):
        train_reward(world.train, clip, gold=FrameDifference(), out=tmp_path / "b")
    with pytest.raises(ValueError, match=r"gold must score each picture by itself; .* compares"):
        train_reward(world.train, clip, gold=Standardised(Brightness(), "prompt"), out=tmp_path / "b")
    with pytest.raises(ValueError, match="both files"):
        train_reward(world.train, clip, heldout=world.train, out=tmp_path / "c")
    ties = world.folder / "ties.jsonl"
    ties.write_text(
        "".join(json.dumps(json.loads(row) | {"winner": None}) + "\n" for row in world.held.read_text().splitlines())
    )
    with pytest.raises(ValueError, match="every pair held out is a tie"):
        train_reward(world.train, clip, heldout=ties, out=tmp_path / "c")
    rows = [json.loads(line) for line in world.train.read_text().splitlines()]
    decided = {p: i for i, p in enumerate(dict.fromkeys(r["prompt"] for r in rows))}
    _, held = split(compare(read_feedback(world.train, "preferences").records), 0.1, 0)
    one = int(held.prompt[0])  # the only prompt of which somebody could tell pictures apart is held out
    few = world.folder / "few.jsonl"
    few.write_text("".join(json.dumps(r if decided[r["prompt"]] == one else r | {"winner": None}) + "\n" for r in rows))
    with pytest.raises(ValueError, match="every pair to learn from is a tie"):
        train_reward(few, clip, heldout=world.held, out=tmp_path / "c")
    nameless = world.folder / "nameless.jsonl"
    nameless.write_text(
        "".join(json.dumps({k: v for k, v in row.items() if k != "annotator"}) + "\n" for row in rows[:60])
    )
    with pytest.raises(ValueError, match='have no "annotator"'):
        train_reward(nameless, clip, head=PAL(width=8), out=tmp_path / "d")
    with pytest.raises(ValueError, match="embeds prompts"):
        train_reward(world.train, CrossEncoder(), head=PAL(by_prompt=True), out=tmp_path / "e")
    quiet = world.folder / "quiet.jsonl"
    quiet.write_text(world.train.read_text() + json.dumps(rows[0] | {"annotator": "silent", "winner": "tie"}) + "\n")
    with pytest.raises(ValueError, match="such as silent"):
        train_reward(quiet, clip, head=PAL(width=8), heldout=world.held, config=FitConfig(seed=1), out=tmp_path / "f")
    assert not any(tmp_path.iterdir())


def test_a_fit_that_diverges_says_so(world: World, clip: CLIPScore, tmp_path: Path):
    config = FitConfig(batch=3, epochs=2, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"loss of what is held out is .*: lower learning_rate, now 1e"):
        train_reward(world.train, clip, heldout=world.held, cache=world.cache, config=config, out=tmp_path / "r")
    assert not (tmp_path / "r" / "config.json").exists()


def test_the_command_trains_adapts_and_steers(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Red rises where a reward learned from someone who likes red steers, and the same folder steers for others."""
    clip = str(Path(__file__).resolve().parents[3] / "assets" / "tiny-clip")
    out = str(tmp_path / "learned")
    how = [
        "--encoder",
        "CLIPScore",
        "--encoder.model",
        clip,
        "--head",
        "PAL",
        "--head.width",
        "16",
        "--batch",
        "2",
        "--epochs",
        "4",
    ]
    told = ["--heldout", str(world.held), "--device", "cpu", "--out", out, "--json"]
    assert main(["train-reward", str(world.train), *how, *told]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert f"accuracy {report['accuracy']:.3f}" in captured.err and out in captured.err
    few = tastes.judged(
        world.folder, "command.jsonl", {"eve": "blue"}, 8, world.made, tastes.PREFIXES[:1], ("a",), seed=5
    )
    assert main(["train-reward", str(few), "--adapt", out, "--out", str(tmp_path / "eve")]) == 0
    assert "13 people" in capsys.readouterr().err
    reward = ["--reward", "Learned", "--reward.model", str(tmp_path / "eve"), "--reward.user", "eve"]
    steering = [
        "--steering",
        "BestOfN",
        "--particles",
        "4",
        "--steps",
        "3",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "steered"),
    ]
    assert main(["steer", "a square", *reward, *steering, "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert all("Learned(user=eve)" in s["scores"] for s in samples)
    with pytest.raises(SystemExit):
        main(["train-reward", str(world.train), "--head", "PALL", "--out", out])


def test_prompts_carry_the_person_into_the_score(pal, world: World):
    red = shown(world, "red").expand(2, -1, -1, -1)
    scores = Learned(str(pal.folder))(red, [Prompt("a square", meta={"annotator": who}) for who in ("red-0", "blue-0")])
    assert scores[0] > scores[1] + 0.5


def test_a_learned_taste_steers_the_embedded_model(pal):
    """The pictures taken for each person are worth more to them than the average one, by how they are known to choose."""
    prompts, policy = ["a square", "a star"], align.load_policy(device="cpu")
    result = align.steer(
        policy, prompts, BestOfN(Learned(str(pal.folder), user="red-0")), particles=8, steps=8, seed=0, plain=False
    )
    drawn = torch.stack([s.pixels for s in result.arm()])
    colors = [things[0].color for things in detect(drawn)]
    taken = [i for i, s in enumerate(result.arm()) if s.best]
    blue = Learned(str(pal.folder), user="blue-0")(drawn, [p for p in prompts for _ in range(8)]).view(2, 8).argmax(1)
    for taste, rows in (("red", taken), ("blue", [int(blue[0]), 8 + int(blue[1])])):
        worth = torch.tensor([tastes.TASTES[taste].get(color, 0.0) for color in colors])
        assert worth[rows].mean() > worth.mean() + 1, taste
