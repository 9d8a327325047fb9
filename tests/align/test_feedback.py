"""Sources of given data: what they collect, that processes share it, that images are encoded once, and D3PO from human choices."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from align import load_policy
from align.batches import Noised, Paths, Steps
from align.choices import sample_pairs, settings_of
from align.data import read_feedback, validate, write_feedback
from align.evidence import evidence
from align.feedback import Captions, Likes, Preferences
from align.given import Encoded
from align.media import Media, fitted, load_rgb
from align.objectives.pairwise import Pairwise
from align.sampling import Sampling
from align.sources import Run
from align.world import World
from rewards import Prompt
from samplers import CPS, DDIM, ODE, Ledger, SeededNoise
from samplers.families.gaussian import GaussianPolicy
from samplers.families.sd import StableDiffusion
from tests.conftest import build_pipeline


class Process:
    """One of several processes, without the others."""

    share = World.share

    def __init__(self, rank=0, size=1):
        self.rank, self.size = rank, size


def run_of(policy, batch=4, rank=0, size=1, seed=0, **how):
    return Run(policy, Sampling.of(policy, **how), Process(rank, size), seed, batch, Ledger())


@pytest.fixture
def gaussian():
    return GaussianPolicy([0.5, -0.5, 1.0])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    policy = StableDiffusion(build_pipeline(tmp_path_factory.mktemp("tiny")))
    policy.source = "tests/tiny"
    return policy


@pytest.fixture
def latents(tmp_path):
    """Six pairs of latents that a Gaussian policy can train on, the first of each the winner."""
    rows = []
    for n in range(6):
        names = [f"{n}-{k}.safetensors" for k in range(2)]
        for k, name in enumerate(names):
            save_file({"x0": torch.full((3,), 10.0 * n + k, dtype=torch.float64)}, tmp_path / name)
        rows.append({"prompt": f"p{n % 2}", "latents": names, "winner": 0})
    return write_feedback(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def pictures(tmp_path):
    """Four pairs of pictures of another size than the model's."""
    rows = []
    for n in range(4):
        names = [f"{n}-{k}.png" for k in range(2)]
        for k, name in enumerate(names):
            noise = torch.rand(24, 30, 3, generator=torch.Generator().manual_seed(2 * n + k)).mul(255).byte()
            Image.fromarray(noise.numpy()).save(tmp_path / name)
        rows.append({"prompt": "abc"[n % 3], "images": names, "winner": n % 2})
    return write_feedback(tmp_path / "pictures.jsonl", rows)


def same(a, b):
    """Whether two batches are equal in every number."""
    first, second = parts_of(a), parts_of(b)
    equal = all(torch.equal(first[name], second[name]) for name in first)
    return first.keys() == second.keys() and equal and a.prompts == b.prompts


def parts_of(batch):
    """Every tensor of a batch, one row each."""
    rows = batch.rows
    made = {"x0": rows.x0, "eps": rows.eps, "t": rows.at.t} if isinstance(rows, Noised) else {"latents": rows.latents}
    return made | {f"cond {name}": value for name, value in rows.cond.positive.items()} | dict(batch.columns)


# What is collected


def test_pairs_put_the_winner_first_and_share_noise_and_level(gaussian, latents):
    source, run = Preferences(str(latents)), run_of(gaussian, batch=6)
    source.check(run)
    batch = source.collect(run, 0)
    rows = batch.rows
    assert isinstance(rows, Noised) and (len(batch), batch.items, batch.members) == (12, 6, 2)
    assert batch.columns["quality"].tolist() == [1.0, 0.0] * 6
    first, second = rows.x0[::2], rows.x0[1::2]
    assert torch.equal(second - first, torch.ones(6, 3, dtype=torch.float64))
    assert torch.equal(rows.eps[::2], rows.eps[1::2]) and torch.equal(rows.at.t[::2], rows.at.t[1::2])
    assert len(set(rows.at.t.tolist())) == 6
    assert sorted(first[:, 0].tolist()) == [0, 10, 20, 30, 40, 50], "one pass takes every pair once"
    assert rows.cond.guidance == 1.0 and set(source.columns) <= set(batch.columns)
    assert [batch.prompts[i].text for i in range(12)] == [f"p{int(x) // 10 % 2}" for x in rows.x0[:, 0].tolist()]
    assert source.prompts_for_evaluation() == [Prompt("p0"), Prompt("p1")]


@pytest.mark.parametrize("draws", [1, 3])
def test_a_collection_is_a_function_of_seed_and_iteration(gaussian, latents, draws):
    source, run = Preferences(str(latents), draws=draws), run_of(gaussian, batch=6)
    assert same(source.collect(run, 3), Preferences(str(latents), draws=draws).collect(run, 3))
    other = source.collect(run, 4)
    assert not torch.equal(source.collect(run, 3).rows.eps, other.rows.eps)
    assert not torch.equal(
        source.collect(run_of(gaussian, batch=6, seed=1), 3).rows.eps, source.collect(run, 3).rows.eps
    )


def test_draws_are_items_of_their_own(gaussian, latents):
    batch = Preferences(str(latents), draws=3).collect(run_of(gaussian, batch=6), 0)
    x0 = batch.rows.x0.reshape(2, 3, 2, 3)
    assert batch.items == 6 and torch.equal(x0[:, :1].expand_as(x0), x0)
    assert len(set(batch.rows.at.t.tolist())) == 6
    with pytest.raises(ValueError, match="multiple of draws"):
        Preferences(str(latents), draws=4).check(run_of(gaussian, batch=6))


@pytest.mark.parametrize("make", ["clean", "dropout", "steps", "likes", "captions"])
def test_processes_share_one_collection(gaussian, latents, tmp_path, make):
    if make == "steps":
        path = chosen_by(sample_pairs(gaussian, [f"p{n}" for n in range(3)], tmp_path / "out", steps=3), lambda x: x[0])
        source = Preferences(str(path), evidence="steps")
    else:
        source = {
            "clean": lambda: Preferences(str(latents), draws=2),
            "dropout": lambda: Preferences(str(latents), prompt_dropout=0.5),
            "likes": lambda: Likes(str(latents), of="preferences", positive_ratio=0.75),
            "captions": lambda: Captions(str(latents), of="preferences"),
        }[make]()
    how = {"batch": 4, "steps": 3}
    for iteration in (0, 5):
        whole = parts_of(source.collect(run_of(gaussian, **how), iteration))
        halves = [parts_of(source.collect(run_of(gaussian, rank=rank, size=2, **how), iteration)) for rank in (0, 1)]
        for name, value in whole.items():
            assert torch.equal(torch.cat([half[name] for half in halves]), value), name
    with pytest.raises(ValueError, match="divided evenly"):
        source.check(run_of(gaussian, batch=4, size=3, steps=3))


def test_ties_are_dropped_or_kept(gaussian, tmp_path, latents):
    rows = [json.loads(line) for line in latents.read_text().splitlines()]
    rows[0]["winner"] = None
    path = write_feedback(latents.with_name("ties.jsonl"), rows)
    assert len(Preferences(str(path)).items) == 5
    kept = Preferences(str(path), ties="keep")
    quality = kept.collect(run_of(gaussian, batch=6), 0).columns["quality"].reshape(6, 2)
    assert len(kept.items) == 6 and (quality[:, 0] == quality[:, 1]).sum() == 1
    with pytest.raises(ValueError, match="nothing to train on"):
        Preferences(str(write_feedback(path, rows[:1])))


def test_lists_and_columns(gaussian, latents):
    files = [f"{n}-0.safetensors" for n in range(4)]
    rows = [
        {"prompt": "p", "latents": files, "scores": [3, 1, 2, 5], "margin": [1, 2, 3, 4], "weight": 2},
        {"prompt": "q", "latents": files, "scores": [4, 4, 1, 0], "margin": [0, 0, 0, 1]},
    ]
    path = str(write_feedback(latents.with_name("lists.jsonl"), rows))
    source = Preferences(path, as_list=True)
    batch = source.collect(run_of(gaussian, batch=2), 0)
    assert (source.members, batch.members, len(batch)) == (4, 4, 8)
    which = 0 if batch.prompts[0].text == "p" else 4
    columns = {name: batch.columns[name][which : which + 4].tolist() for name in source.columns}
    assert columns["reward"] == [3, 1, 2, 5] and columns["margin"] == [1, 2, 3, 4] and columns["weight"] == [2] * 4
    assert columns["quality"] == [0.5, 0, 0.25, 1] and columns["keep"] == [True] * 4
    assert len(Preferences(path).items) == 6 + 5 and len(Preferences(path, ties="keep").items) == 12
    mixed = [rows[0], {"prompt": "q", "latents": files[:2], "winner": 0}]
    with pytest.raises(ValueError, match="rows with a margin and rows without, such as line 2"):
        Preferences(str(write_feedback(path, mixed)))
    del mixed[0]["margin"]
    with pytest.raises(ValueError, match=r"as_list needs rows of equally many media; .*\[2, 4\]"):
        Preferences(str(write_feedback(path, mixed)), as_list=True)
    assert set(Preferences(path).columns) == {"weight", "group", "keep", "quality"}


def test_the_margin_of_a_pair_is_the_winners(gaussian, latents):
    rows = [json.loads(line) | {"margin": 0.7, "winner": 1} for line in latents.read_text().splitlines()]
    batch = Preferences(str(write_feedback(latents, rows))).collect(run_of(gaussian), 0)
    torch.testing.assert_close(batch.columns["margin"].reshape(-1, 2), torch.tensor([[0.7, 0.0]] * 4))


def test_what_does_not_fit_the_model_is_refused_before_training(gaussian, latents, pictures, tiny):
    with pytest.raises(ValueError, match=r"holds \(3,\), but a clean latent of this run has shape \(4, 8, 8\)"):
        Preferences(str(latents)).check(run_of(tiny))
    with pytest.raises(ValueError, match="these data are images"):
        Preferences(str(pictures)).check(run_of(gaussian))

    class Blind(GaussianPolicy):
        encode_media = GaussianPolicy.__mro__[1].encode_media

    blind = Blind([0.0])
    with pytest.raises(ValueError, match="cannot encode images"):
        Preferences(str(pictures)).check(run_of(blind))
    with pytest.raises(NotImplementedError, match="Blind cannot encode images"):
        blind.encode_media(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="multiples of"):
        Preferences(str(pictures), size=(7, 9)).check(run_of(tiny))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"draws": 0}, "draws must be"),
        ({"t": "cosine"}, "t must be"),
        ({"prompt_dropout": 2}, "prompt_dropout"),
        ({"evidence": "step"}, "evidence is"),
        ({"ties": "maybe"}, "ties"),
        ({"timestep_fraction": 0}, "timestep_fraction"),
        ({"evidence": "steps", "draws": 2}, "are for evidence"),
        ({"evidence": "steps", "prompt_dropout": 0.1}, "are for evidence"),
        ({"ignore": ["size", "steps"]}, "ignore takes"),
        ({"skip": ["tie"]}, "skip takes"),
    ],
)
def test_options_that_make_no_sense(latents, how, message):
    with pytest.raises(ValueError, match=message):
        Preferences(str(latents), **how)


# Images


def test_images_are_encoded_once(tiny, pictures):
    source, run = Preferences(str(pictures)), run_of(tiny, batch=4)
    source.check(run)
    first, again = source.collect(run, 0), source.collect(run, 0)
    assert source.encoded.encoded == 8 and same(first, again)
    source.collect(run, 1)
    assert source.encoded.encoded == 8
    assert first.rows.x0.shape == (8, 4, 8, 8)


def test_a_latent_does_not_depend_on_what_it_is_encoded_with(tiny, pictures):
    whole = parts_of(Preferences(str(pictures)).collect(run_of(tiny), 0))["x0"]
    ranks = [Preferences(str(pictures)).collect(run_of(tiny, rank=rank, size=4), 0) for rank in range(4)]
    assert torch.equal(torch.cat([batch.rows.x0 for batch in ranks]), whole)


def test_a_cache_on_disk_gives_what_encoding_gives(tiny, pictures, tmp_path):
    run, folder = run_of(tiny, batch=4), tmp_path / "cache"
    plain = Preferences(str(pictures)).collect(run, 0)
    for encoded in (8, 0):
        source = Preferences(str(pictures), cache=str(folder))
        assert same(source.collect(run, 0), plain) and source.encoded.encoded == encoded
    files = sorted(folder.iterdir())
    assert len(files) == 8 and all(f.suffix == ".safetensors" for f in files)
    files[0].write_bytes(files[0].read_bytes()[:-5])
    source = Preferences(str(pictures), cache=str(folder))
    assert same(source.collect(run, 0), plain) and source.encoded.encoded == 1, "a damaged file is made again"
    (pictures.parent / "0-0.png").write_bytes((pictures.parent / "1-1.png").read_bytes())
    source = Preferences(str(pictures), cache=str(folder), verify=False)
    source.collect(run, 0)
    assert source.encoded.encoded == 0, "the content counts, not the name"


def test_the_cache_tells_models_and_sizes_apart(tiny, pictures, tmp_path):
    media = [Media("x", pictures.parent / "0-0.png")]
    encoded = Encoded(tmp_path / "cache")
    small, large = encoded(tiny, media, (16, 16)), encoded(tiny, media, (32, 32))
    assert small.shape != large.shape and encoded.encoded == 2
    other = StableDiffusion(tiny.pipe)
    other.source = "tests/other"
    encoded(other, media, (16, 16))
    assert encoded.encoded == 3


def test_memory_forgets_the_least_recent(tiny, pictures, monkeypatch):
    monkeypatch.setattr("align.given.REMEMBERED", 2 * 4 * 8 * 8 * 4)
    media = [Media(str(n), pictures.parent / f"{n}-0.png") for n in range(3)]
    encoded = Encoded()
    expected = [Encoded()(tiny, [m], (16, 16)) for m in media]
    for m, x0 in zip(media, expected, strict=True):
        assert torch.equal(encoded(tiny, [m], (16, 16)), x0)
    assert len(encoded.latents) == 2
    encoded(tiny, media[1:], (16, 16))
    assert encoded.encoded == 3
    assert torch.equal(encoded(tiny, media, (16, 16)), torch.cat(expected)) and encoded.encoded == 4


def test_encoding_does_not_depend_on_the_chunk(tiny, pictures):
    pixels = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = tiny.encode_media(pixels)
    tiny.decode_chunk, before = 2, tiny.decode_chunk
    torch.testing.assert_close(tiny.encode_media(pixels), whole)
    tiny.decode_chunk = before
    assert not whole.requires_grad
    mode = tiny.vae.encode(2 * pixels - 1).latent_dist.mode() * tiny.vae.config.scaling_factor
    torch.testing.assert_close(whole, mode.detach())


def test_dropped_prompts_become_the_empty_prompt(tiny, pictures):
    run = run_of(tiny, batch=40)
    batch = Preferences(str(pictures), prompt_dropout=0.4).collect(run, 0)
    told = batch.rows.cond.positive["encoder_hidden_states"]
    own = tiny.encode(list(batch.prompts)).positive["encoder_hidden_states"]
    empty = tiny.encode([""]).positive["encoder_hidden_states"][0]
    dropped = torch.tensor([torch.equal(row, empty) for row in told]).reshape(-1, 2)
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(told, own, strict=True)]).reshape(-1, 2)
    assert torch.equal(dropped[:, 0], dropped[:, 1]) and torch.equal(dropped, ~kept)
    assert 0.2 < dropped.float().mean() < 0.6 and all(p.text for p in batch.prompts)
    assert not Preferences(str(pictures)).prompt_dropout


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_shipped_preferences_train_the_shipped_model(split):
    policy = load_policy(device="cpu")
    source = Preferences(f"assets/preferences/{split}.parquet")
    run = run_of(policy, batch=4)
    source.check(run)
    batch = source.collect(run, 0)
    assert isinstance(batch.rows, Noised) and len(batch) == 8
    assert {p.text for p in batch.prompts} <= {r.prompt.text for r in source.feedback}
    seen = policy.decode(batch.rows.x0)
    item = source.chosen(run, 0)[0]
    assert (seen[0] - fitted(load_rgb(item.record.images[item.order[0]]), policy.size)).abs().mean() < 0.05
    loss, metrics = Pairwise().loss(remembering(policy), batch)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)


def remembering(policy):
    policy.network.requires_grad_(True)
    policy.remember("reference")
    return policy


# Likes and captions


@pytest.fixture
def likes(tmp_path, latents):
    rows = [{"prompt": f"p{n}", "latent": f"{n}-0.safetensors", "label": int(n > 3)} for n in range(6)]
    return write_feedback(tmp_path / "likes.jsonl", rows)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.8, 1.0])
def test_likes_come_in_the_wanted_proportion(gaussian, likes, ratio):
    source, run = Likes(str(likes), positive_ratio=ratio), run_of(gaussian, batch=20)
    source.check(run)
    for iteration in range(3):
        batch = source.collect(run, iteration)
        assert (batch.members, batch.items) == (1, 20)
        label = batch.columns["label"]
        assert label.sum() == ratio * 20
        assert torch.equal(label, (batch.rows.x0[:, 0] > 35).float())
        assert len(set(batch.rows.at.t.tolist())) == 20, "noise is not shared between images"


def test_every_image_is_taken_equally_often(gaussian, likes):
    source, seen = Likes(str(likes), positive_ratio=0.5), []
    for iteration in range(8):
        seen += source.collect(run_of(gaussian, batch=2), iteration).rows.x0[:, 0].tolist()
    assert [seen.count(10.0 * n) for n in range(6)] == [2, 2, 2, 2, 4, 4]


def test_likes_as_they_are_or_of_one_kind_only(gaussian, likes):
    label = Likes(str(likes), positive_ratio=None).collect(run_of(gaussian, batch=6), 0).columns["label"]
    assert label.sum() == 2
    rows = [json.loads(line) | {"label": 1} for line in likes.read_text().splitlines()]
    path = str(write_feedback(likes, rows))
    with pytest.raises(ValueError, match="no image that is not liked: pass positive_ratio=None"):
        Likes(path)
    assert len(Likes(path, positive_ratio=1.0).items) == len(Likes(path, positive_ratio=None).items) == 6
    with pytest.raises(ValueError, match="positive_ratio must lie"):
        Likes(path, positive_ratio=1.5)


def test_images_once_preferred_are_liked(gaussian, latents):
    a, b, c, d = (f"{n}-0.safetensors" for n in range(4))
    rows = [
        {"prompt": "p", "latents": [a, b], "winner": 0},
        {"prompt": "p", "latents": [a, c], "winner": 1},
        {"prompt": "p", "latents": [c, d], "winner": None},
        {"prompt": "q", "latents": [a, b], "winner": 1},
    ]
    source = Likes(str(write_feedback(latents, rows)), of="preferences")
    found = {(i.record.prompt.text, i.record.latents[i.order[0]].name): i.label for i in source.items}
    assert found == {("p", a): 1, ("p", b): 0, ("p", c): 1, ("q", a): 0, ("q", b): 1}


def test_captions_and_winners(gaussian, latents):
    files = [f"{n}-0.safetensors" for n in range(3)]
    captions = [{"prompt": f"p{n}", "latent": file} for n, file in enumerate(files)]
    source = Captions(str(write_feedback(latents.with_name("captions.jsonl"), captions)))
    batch = source.collect(run_of(gaussian, batch=3), 0)
    assert sorted(batch.rows.x0[:, 0].tolist()) == [0, 10, 20] and batch.members == 1
    rows = [
        {"prompt": "p", "latents": files, "ranking": [[0, 1], 2]},
        {"prompt": "p", "latents": files[1:], "winner": 0},
        {"prompt": "p", "latents": [files[0], "3-0.safetensors"], "winner": None},
    ]
    source = Captions(str(write_feedback(latents, rows)), of="preferences")
    assert sorted(i.record.latents[i.order[0]].name for i in source.items) == files[:2]
    with pytest.raises(ValueError, match="belongs to preferences"):
        Captions(str(latents))
    with pytest.raises(ValueError, match="nothing to train on"):
        Captions(str(write_feedback(latents, rows[2:])), of="preferences")


# Choices that people make


def chosen_by(choices, value, every=1):
    """Fills in the file as a person would who prefers the final sample of higher value."""
    rows = [json.loads(line) for line in choices.read_text().splitlines()]
    for row in rows[::every]:
        finals = [load_file(choices.parent / name)["latents"][-1] for name in row["latents"]]
        row["winner"] = max(range(len(finals)), key=lambda k: float(value(finals[k])))
    return write_feedback(choices, rows)


def test_sampled_choices_are_on_disk_and_wait_for_a_person(tiny, tmp_path):
    path = sample_pairs(tiny, ["abc", Prompt("abd", "bad")], tmp_path / "out", steps=3, seed=5, group=3, batch=3)
    assert {p.status for p in validate(path, "preferences")} == {"unlabelled"}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["abc", "abd"] and rows[1]["negative"] == "bad"
    assert rows[0]["seeds"] == [5, 6, 7] and len(set(rows[0]["seeds"] + rows[1]["seeds"])) == 6
    assert rows[0]["settings"]["kernel"] == "DDIM(eta=1.0)" and rows[0]["settings"]["shared_start"] is True
    paths = [load_file(tmp_path / "out" / name)["latents"] for name in rows[0]["latents"]]
    assert all(p.shape == (4, 4, 8, 8) and p.dtype == tiny.dtype for p in paths)
    assert torch.equal(paths[0][0], paths[1][0]) and not torch.equal(paths[0][1], paths[1][1])
    noise = SeededNoise([5], (4, 8, 8))(0)[0]
    assert torch.equal(paths[0][0], noise)
    image = Image.open(tmp_path / "out" / rows[0]["images"][2])
    seen = tiny.decode(paths[2][-1:])[0].mul(255).round().byte()
    assert image.size == tiny.size[::-1] and torch.equal(
        torch.tensor(list(image.tobytes())).reshape(16, 16, 3), seen.permute(1, 2, 0)
    )
    assert not list((tmp_path / "out").rglob("*.partial"))
    with pytest.raises(FileExistsError, match="choices that people have made"):
        sample_pairs(tiny, ["abc"], tmp_path / "out", steps=3)


def test_samples_do_not_depend_on_the_batch(gaussian, tmp_path):
    how = {"steps": 3, "group": 2, "shared_start": False}
    one, two = (sample_pairs(gaussian, list("abc"), tmp_path / str(b), batch=b, **how) for b in (2, 100))
    for row in one.read_text().splitlines():
        for name in json.loads(row)["latents"]:
            first, second = (load_file(p.parent / name)["latents"] for p in (one, two))
            assert torch.equal(first, second)
    assert one.read_text() == two.read_text() and "images" not in one.read_text()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"group": 1}, "group of two or more"),
        ({"kernel": ODE()}, "would be the same"),
        ({"kernel": ODE(), "shared_start": False}, "has no density"),
    ],
)
def test_choices_that_would_be_useless(gaussian, tmp_path, how, message):
    with pytest.raises(ValueError, match=message):
        sample_pairs(gaussian, ["p"], tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()
    sample_pairs(gaussian, "p", tmp_path / "out", kernel=ODE(), shared_start=False, trajectories=False)
    assert load_file(tmp_path / "out" / "trajectories" / "00000-1.safetensors")["x0"].shape == (3,)


@pytest.fixture
def judged(gaussian, tmp_path):
    """Trajectories of which people prefer those that end high."""
    prompts = [f"p{n}" for n in range(8)]
    return chosen_by(sample_pairs(gaussian, prompts, tmp_path / "out", steps=4, kernel=CPS(0.5)), lambda x: x.sum())


FITTING = {"steps": 4, "kernel": CPS(0.5)}


def test_trajectories_are_taken_as_recorded(gaussian, judged):
    source, run = Preferences(str(judged), evidence="steps"), run_of(gaussian, batch=8, **FITTING)
    source.check(run)
    batch = source.collect(run, 0)
    assert source.makes is Steps and isinstance(batch.rows, Paths) and batch.rows.latents.shape == (16, 5, 3)
    final = batch.rows.latents[:, -1].sum(1).reshape(8, 2)
    assert bool((final[:, 0] > final[:, 1]).all()), "the winner comes first"
    assert batch.rows.cond.guidance == run.sampling.guidance
    assert same(batch, source.collect(run, 0))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_trajectories_unfold_item_by_item(gaussian, judged, fraction):
    source = Preferences(str(judged), evidence="steps", timestep_fraction=fraction, skip_last=1)
    batch = source.collect(run_of(gaussian, batch=8, **FITTING), 0)
    batch = batch.having(item=torch.arange(8).repeat_interleave(2))
    steps = source.choose(batch, seed=3)
    count = {1.0: 3, 0.5: 2}[fraction]
    assert isinstance(steps.rows, Steps) and steps.items == 8 * count and steps.members == 2
    assert steps.rows.step.reshape(8, count, 2).max() < 3
    assert torch.equal(steps.rows.step[::2], steps.rows.step[1::2])
    later = source.choose(batch.take([5, 2]), seed=3)
    place = torch.tensor([5, 2])[:, None] * count + torch.arange(count)
    assert torch.equal(later.rows.x, steps.take(place.flatten()).rows.x), (
        "an item's steps do not depend on its neighbours"
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 5, "kernel": CPS(0.5)}, "steps: 4 was recorded, the run has 5"),
        ({"steps": 4, "kernel": DDIM(1.0)}, r"kernel: 'CPS\(eta=0.5\)' was recorded, the run has 'DDIM\(eta=1.0\)'"),
        ({"steps": 4, "kernel": CPS(0.5), "guidance": 3.0}, "guidance: 1.0 was recorded, the run has 3.0"),
        ({"steps": 4, "kernel": ODE()}, "no stochastic step"),
    ],
)
def test_trajectories_of_another_run_are_refused(gaussian, judged, how, message):
    with pytest.raises(ValueError, match=message):
        Preferences(str(judged), evidence="steps").check(run_of(gaussian, **how))


def test_what_does_not_matter_can_be_ignored(gaussian, judged):
    source = Preferences(str(judged), evidence="steps", ignore=("guidance", "kernel"))
    source.check(run_of(gaussian, steps=4, kernel=CPS(0.6), guidance=3.0))
    gaussian.source = "another/model"
    with pytest.raises(ValueError, match="model: 'GaussianPolicy' was recorded"):
        source.check(run_of(gaussian, **FITTING))
    with pytest.raises(ValueError, match="steps: 4 was recorded, the run has 2"):
        Preferences(str(judged), evidence="steps", ignore=("model",)).check(run_of(gaussian, steps=2, kernel=CPS(0.5)))


def test_a_model_may_move_to_another_folder(gaussian, judged):
    run = run_of(gaussian, **FITTING)
    rows = [json.loads(line) for line in judged.read_text().splitlines()]
    for row in rows:
        row["settings"]["model"] = "/home/someone/models/tiny"
    gaussian.source = "/mnt/elsewhere/tiny"
    Preferences(str(write_feedback(judged, rows)), evidence="steps").check(run)
    assert settings_of(gaussian, run.sampling)["steps"] == 4


def test_trajectories_without_settings_or_of_other_length(gaussian, judged, latents):
    run = run_of(gaussian, **FITTING)
    rows = [json.loads(line) for line in judged.read_text().splitlines()]
    del rows[3]["settings"]
    with pytest.raises(ValueError, match="line 4 do not fit this run: model: was not recorded"):
        Preferences(str(write_feedback(judged, rows)), evidence="steps").check(run)
    rows[3]["settings"] = rows[0]["settings"]
    for name in rows[3]["latents"]:
        save_file({"latents": torch.zeros(4, 3)}, judged.parent / name)
    with pytest.raises(
        ValueError, match=r"holds \(4, 3\), but a trajectory \(T\+1, …\) of this run has shape \(5, 3\)"
    ):
        Preferences(str(write_feedback(judged, rows)), evidence="steps").check(run)
    with pytest.raises(ValueError, match="do not fit this run"):
        Preferences(str(latents), evidence="steps").check(run)


def implied(policy, batch):
    """How much more the policy than the reference prefers winners to losers, one number an item."""
    now = evidence(policy, batch.rows, "sum")
    with torch.no_grad(), policy.acting_as("reference"):
        before = evidence(policy, batch.rows, "sum")
    return (now - before).reshape(-1, 2).diff(dim=1).neg().squeeze(1)


def test_human_choices_alone_teach_a_policy(gaussian, judged, tmp_path):
    """D3PO without a reward model: choices on some trajectories raise the implied preference on others."""
    held = chosen_by(
        sample_pairs(gaussian, [f"h{n}" for n in range(32)], tmp_path / "held", seed=10**9, **FITTING),
        lambda x: x.sum(),
    )
    policy = remembering(gaussian)
    run = run_of(policy, batch=32, **FITTING)

    def unfolded(path, batch=32, iteration=0):
        source = Preferences(str(path), evidence="steps")
        collected = source.collect(replace(run, batch=batch), iteration)
        items = torch.arange(collected.items).repeat_interleave(2)
        return source.choose(collected.having(item=items), seed=iteration)

    objective, optimizer = Pairwise(reduction="sum", beta=0.1), torch.optim.SGD([policy.network.means], lr=0.5)
    before = implied(policy, unfolded(held)).mean().item()
    start = policy.network.means.detach().clone()
    losses = []
    for iteration in range(10):
        loss, _ = objective.loss(policy, unfolded(judged, 8, iteration))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = implied(policy, unfolded(held)).detach()
    assert before == pytest.approx(0, abs=1e-9) and losses[-1] < losses[0]
    assert after.mean() > 0.05 and (after > 0).double().mean() > 0.6
    assert (policy.network.means - start).sum() > 0.1, "the samples move to where people want them"


def test_the_same_choices_teach_a_diffusion_model(tiny, tmp_path):
    """A step on the tiny random pipeline, from PNGs and trajectories a person has judged."""
    path = sample_pairs(tiny, ["abc", "abd", "ace", "bcd"], tmp_path / "out", steps=3, guidance=2.0)
    chosen_by(path, lambda x: x.mean())
    network = {name: p.clone() for name, p in tiny.network.named_parameters()}
    policy = remembering(tiny)
    run = run_of(policy, batch=4, steps=3, guidance=2.0)
    source = Preferences(str(path), evidence="steps")
    source.check(run)
    collected = source.collect(run, 0)
    batch = source.choose(collected.having(item=torch.arange(4).repeat_interleave(2)), 0)
    objective, optimizer = Pairwise(), torch.optim.SGD(policy.network.parameters(), lr=0.05)
    with torch.no_grad():
        before = implied(policy, batch).mean()
    assert before == 0
    for _ in range(3):
        loss, _ = objective.loss(policy, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert implied(policy, batch).mean() > 0
        for name, p in policy.network.named_parameters():
            p.copy_(network[name])
    policy.network.requires_grad_(False)
    clean = Preferences(str(path)).collect(run, 0)
    assert isinstance(clean.rows, Noised) and len(read_feedback(path, "preferences")) == 4
