"""The embedded models: intact, small, loadable by the libraries they claim, and as good as the manifest says."""

import hashlib
import io
import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from rewards.crossencoder import CrossEncoder
from rewards.shapes import TASKS, Shapes, parse

ASSETS = Path(__file__).parents[2] / "assets"
MANIFEST = json.loads((ASSETS / "MANIFEST.json").read_text())
LIMIT = 36_000_000


def lines(name):
    return [json.loads(line) for line in (ASSETS / "prompts" / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "tiny-sd", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pairs():
    return {
        split: parquet.read_table(ASSETS / "preferences" / f"{split}.parquet").to_pylist()
        for split in ("train", "heldout")
    }


def pixels(row, column):
    data = torch.frombuffer(bytearray(Image.open(io.BytesIO(row[column])).convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(32, 32, 3).permute(2, 0, 1).float() / 255


def test_every_shipped_file_is_in_the_manifest_and_intact():
    folders = [path for path in ASSETS.iterdir() if path.is_dir() and path.name not in ("build", "screenshots")]
    shipped = {str(p.relative_to(ASSETS)): p for folder in folders for p in folder.rglob("*") if p.is_file()}
    assert shipped.keys() == MANIFEST["files"].keys()
    for name, path in shipped.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == MANIFEST["files"][name]["sha256"], name


def test_everything_together_is_small():
    assert sum(entry["bytes"] for entry in MANIFEST["files"].values()) == MANIFEST["total_bytes"] < LIMIT


def test_held_out_prompts_are_forty_a_task():
    rows = lines("heldout.jsonl")
    assert len({row["prompt"] for row in rows}) == 240
    for task in TASKS:
        assert sum(row["task"] == task for row in rows) == 40
    assert all(parse(row["prompt"]).task == row["task"] for row in rows + lines("train.jsonl"))


def test_held_out_prompts_appear_in_no_training_text(pairs):
    held = {row["prompt"] for row in lines("heldout.jsonl")}
    assert not held & {row["prompt"] for row in lines("train.jsonl")}
    assert not held & {row["caption"] for row in pairs["train"]}
    assert {row["caption"] for row in pairs["heldout"]} <= held


def test_held_out_pairs_of_objects_appear_in_no_training_text(pairs):
    def combos(texts):
        scenes = [parse(text) for text in texts]
        return {frozenset((n.color, n.shape) for n in s.nouns) for s in scenes if len(s.nouns) == 2}

    held = combos(row["prompt"] for row in lines("heldout.jsonl"))
    seen = combos([row["prompt"] for row in lines("train.jsonl")] + [row["caption"] for row in pairs["train"]])
    assert len(held) == 76
    assert not held & seen


def test_tiny_sd_is_a_stable_diffusion_pipeline(pipe):
    assert pipe.vae.config.scaling_factor == 1
    assert pipe.unet.config.sample_size * 4 == 32
    assert pipe.safety_checker is None
    ids = pipe.tokenizer(["a red circle", ""], padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (2, pipe.tokenizer.model_max_length)
    assert (ids == pipe.tokenizer.eos_token_id).any(1).all()


def test_tokenizer_knows_every_word_of_every_prompt(pipe):
    for row in lines("heldout.jsonl") + lines("train.jsonl"):
        words = row["prompt"].split()
        assert len(pipe.tokenizer(row["prompt"]).input_ids) == len(words) + 2 <= pipe.tokenizer.model_max_length


def test_latents_are_white(pipe, pairs):
    images = torch.stack([pixels(row, "jpg_0") for row in pairs["train"][::20]])
    with torch.no_grad():
        latents = pipe.vae.encode(2 * images - 1).latent_dist.mean
        again = pipe.vae.decode(latents).sample
    assert latents.mean((0, 2, 3)).abs().max() < 0.3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.3
    assert (again - (2 * images - 1)).square().mean() < 0.01


def test_tiny_sd_draws_what_it_is_asked(pipe):
    settings = MANIFEST["tiny-sd"]["settings"]
    assert settings.items() <= json.loads((ASSETS / "tiny-sd" / "generation_config.json").read_text()).items()
    texts = [row["prompt"] for row in lines("heldout.jsonl") if row["task"] in ("single_object", "colors")][::4]
    seeds = [torch.Generator().manual_seed(i) for i in range(len(texts))]
    images = pipe(texts, generator=seeds, output_type="pt", **settings).images.float()
    gold = MANIFEST["tiny-sd"]["gold_heldout"]
    expected = (gold["single_object"] + gold["colors"]) / 2
    assert Shapes()(images, texts).mean() >= expected - 0.2  # three standard errors of 20 draws


def test_tiny_turbo_draws_in_four_steps_nearly_as_well_as_its_teacher():
    """All held-out prompts: within 0.1 of the teacher, as the manifest says it is; in one step still far from nothing."""
    from diffusers import LatentConsistencyModelPipeline

    pipe = LatentConsistencyModelPipeline.from_pretrained(ASSETS / "tiny-turbo", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    claimed, rows = MANIFEST["tiny-turbo"]["gold_heldout"], lines("heldout.jsonl")
    teacher = MANIFEST["tiny-sd"]["gold_heldout"]["overall"]
    settings = json.loads((ASSETS / "tiny-turbo" / "generation_config.json").read_text())
    for steps in (1, settings["num_inference_steps"]):
        scores = []
        for start in range(0, len(rows), 40):
            texts = [row["prompt"] for row in rows[start : start + 40]]
            seeds = [torch.Generator().manual_seed(start + i) for i in range(len(texts))]
            how = {"num_inference_steps": steps, "guidance_scale": settings["guidance_scale"]}
            scores.append(Shapes()(pipe(texts, generator=seeds, output_type="pt", **how).images.float(), texts))
        gold = float(torch.cat(scores).mean())
        assert gold == pytest.approx(claimed[str(steps)]["overall"], abs=0.01)
    assert gold >= teacher - 0.1


def test_manifest_keeps_its_promises():
    gold = MANIFEST["tiny-sd"]["gold_heldout"]
    assert set(gold) == {*TASKS, "overall"}
    assert 0.4 <= gold["overall"] <= 0.9
    assert MANIFEST["agreement_with_gold"]["tiny-reward"]["overall"]["agrees"] >= 0.85


def test_tiny_clip_loads_and_reads():
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(ASSETS / "tiny-clip", dtype=torch.float32)
    processor = CLIPProcessor.from_pretrained(ASSETS / "tiny-clip")
    image = Image.new("RGB", (32, 32), (240, 240, 240))
    image.paste((225, 25, 30), (8, 8, 24, 24))
    texts = ["a red square", "a blue square", "three red squares", "a green star"]
    with torch.no_grad():
        out = model(**processor(text=texts, images=image, return_tensors="pt", padding="max_length"))
    assert out.logits_per_image.argmax() == 0


def test_preferences_are_rows_a_person_could_have_made(pairs):
    assert len(pairs["train"]) >= 1500
    assert {row["annotator"] for row in pairs["heldout"]} == {"gold"}
    for row in pairs["train"]:
        assert row["label_0"] + row["label_1"] == 1
        assert row["label_0"] in (0, 0.5, 1)
        assert row["seed_0"] != row["seed_1"]


def test_tiny_reward_orders_held_out_pairs_as_gold(pairs):
    rows = [row for row in pairs["heldout"] if row["label_0"] != 0.5][:200]
    reward, texts = CrossEncoder(ASSETS / "tiny-reward"), [row["caption"] for row in rows]
    first, second = (reward(torch.stack([pixels(row, column) for row in rows]), texts) for column in ("jpg_0", "jpg_1"))
    right = (first > second) == (torch.tensor([row["label_0"] for row in rows]) > 0.5)
    assert right.float().mean() >= 0.85
