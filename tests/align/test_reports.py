"""Reports: strict JSON, exact rewinding, pictures that can be read back, and nothing that is allowed to lose a run."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from align import Lora, curves, load_policy, pictures, reports, trackers
from align.adapters import add_lora, save_adapter
from align.card import plain_use, write_card
from align.evaluation import Evaluation, paired_gain
from align.reports import Report, TrainResult
from align.sampling import Sampling
from rewards import Prompt
from samplers import Ledger
from samplers.families.gaussian import GaussianPolicy
from samplers.families.qwen_image import QwenImage
from samplers.families.sd3 import StableDiffusion3
from samplers.families.z_image import ZImage
from tests.samplers.families.tiny import qwen_image, sd, sd3, z_image

SAMPLES, PROMPTS = 2, ["three green stars", "an orange ring\nleft of a black square", "кошка " * 80]
EVALUATOR = SimpleNamespace(prompts=[Prompt(p) for p in PROMPTS], samples=SAMPLES)
N = SAMPLES * len(PROMPTS)
DESCRIPTION = {
    "policy": {"model": "someone/some-model", "dtype": "float32", "device": "cpu"},
    "objective": {"class_path": "align.objectives.backprop.Backprop", "init_args": {"clip": math.inf, "note": None}},
    "source": {"class_path": "align.sources.Prompts", "init_args": {"prompts": PROMPTS}},
    "reward": {"class_path": "rewards.clip.CLIPScore", "init_args": {}},
    "train": {"class_path": "align.config.TrainConfig", "init_args": {"learning_rate": 3e-4, "ema": 0.0}},
}


def strict(text: str):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def lines(path):
    return [strict(line) for line in path.read_text().splitlines()]


def evaluation(update: int, *, images: bool = True, hollow: bool = False, names=("CLIPScore", "gold")) -> Evaluation:
    """Optimised rewards that rise and a judge that peaks at update 10."""
    draw = torch.Generator().manual_seed(update)
    noise = 0.01 * torch.randn(N, generator=draw)
    scores = {"CLIPScore": noise + 0.01 * update, "gold": 0.5 - abs(update - 10) / 20 + noise}
    scores["gold"][1] = math.nan
    if hollow:
        scores = {name: torch.full((N,), math.nan) for name in scores}
    media = torch.rand(N, 3, 24, 24, generator=draw) * 0.9 if images else torch.randn(N, 5, generator=draw)
    number = math.nan if hollow else 0.1 * update
    return Evaluation({n: scores[n] for n in names}, number, number, media)


def play(report: Report, first: int, last: int, every: int = 5, total: int = 20, **how):
    """Updates first … last with their evaluations, the one before any update included."""
    log, evaluations = [], []
    if first == 1:
        evaluations.append((0, evaluation(0, **how)))
        report.evaluation(*evaluations[-1], EVALUATOR)
    for update in range(first, last + 1):
        row = {"update": update, "loss": math.nan if update == 3 else -0.1, "reward": 0.1 * update, "seconds": 0.25}
        log.append(row)
        report.row(row, total)
        if update % every == 0:
            evaluations.append((update, evaluation(update, **how)))
            report.evaluation(*evaluations[-1], EVALUATOR)
    return log, evaluations


def made(out, tracker=None, judge="gold", optimised="CLIPScore"):
    return Report(out, tracker, DESCRIPTION, judge=judge, optimised=optimised)


def finish(report, log, evaluations, stopped=None):
    report.finish(log, evaluations, EVALUATOR, report.judge, report.optimised, Ledger(), stopped)


def is_drawn(path):
    with Image.open(path) as image:
        return min(image.size) > 200 and len(set(image.convert("RGB").resize((64, 64)).tobytes())) > 20


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    report = made(out, "tensorboard")
    log, evaluations = play(report, 1, 20)
    (out / "pytorch_lora_weights.safetensors").touch()
    finish(report, log, evaluations)
    return SimpleNamespace(out=out, log=log, evaluations=evaluations)


# Numbers


def test_lines_are_strict_json_with_null_for_what_is_not_finite(finished):
    log = lines(finished.out / "log.jsonl")
    assert [row["update"] for row in log] == list(range(1, 21))
    assert log[2]["loss"] is None
    assert log[3]["loss"] == -0.1
    told = lines(finished.out / "evaluations.jsonl")
    assert [row["update"] for row in told] == [0, 5, 10, 15, 20]
    assert told[0]["scores"]["gold"][1] is None
    assert told[2]["scores"]["CLIPScore"] == finished.evaluations[2][1].scores["CLIPScore"].tolist()
    assert told[2]["means"]["gold"] == pytest.approx(finished.evaluations[2][1].means()["gold"])


def test_result_says_what_the_run_was_and_gained(finished):
    result = strict((finished.out / "result.json").read_text())
    assert result["config"]["train"] == DESCRIPTION["train"]
    assert result["config"]["objective"]["init_args"]["clip"] is None
    assert (result["updates"], result["judge"], result["optimised"], result["best"]) == (20, "gold", "CLIPScore", 10)
    assert result["seconds"] == pytest.approx(5.0)
    assert result["stopped"] is None
    assert result["over_optimised"] == [15, 20]
    assert result["ledger"]["network_evaluations"] == 0
    assert {"python", "torch"} <= result["versions"].keys()
    gain = paired_gain(finished.evaluations[0][1].scores["gold"], finished.evaluations[2][1].scores["gold"], SAMPLES)
    assert result["evaluations"][2]["gains"]["gold"] == pytest.approx(gain)
    assert not list(finished.out.rglob("*.partial"))


def test_gain_is_that_of_the_best_weights_over_the_first(finished):
    result = TrainResult(finished.out, finished.log, finished.evaluations, "gold", 10, None, "0" * 64)
    expected = paired_gain(
        finished.evaluations[0][1].scores["gold"], finished.evaluations[2][1].scores["gold"], SAMPLES
    )
    assert result.gain() == result.gain("gold") == expected
    assert expected[0] == pytest.approx(0.5, abs=0.02)
    with pytest.raises(KeyError, match=r"CLIPScore.*got 'PickScore'"):
        result.gain("PickScore")
    assert len(repr(result)) < 150 + len(str(finished.out))
    assert "update 10" in repr(result)
    nothing = TrainResult(finished.out, [], [], "gold", 0, "interrupted", "")
    assert all(math.isnan(v) for v in nothing.gain("gold"))
    assert "interrupted" in repr(nothing)


def test_progress_goes_to_standard_error_only(tmp_path, capsys):
    report = made(tmp_path)
    log, evaluations = play(report, 1, 10)
    finish(report, log, evaluations)
    out, err = capsys.readouterr()
    assert out == ""
    assert "update 5: gold" in err
    assert "±" in err
    assert "held-out gold" in err
    assert "0.25 s/update" in err
    assert "10/20" in err


def test_progress_survives_a_process_without_standard_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    report = made(tmp_path)
    finish(report, *play(report, 1, 5))
    assert len(lines(tmp_path / "log.jsonl")) == 5


def test_a_run_that_is_resumed_leaves_what_one_that_never_stopped_leaves(tmp_path, finished, capsys):
    report = made(tmp_path)
    log, evaluations = play(report, 1, 14)
    finish(report, log, evaluations, "interrupted")
    capsys.readouterr()
    again = made(tmp_path)
    log, evaluations = log[:8], evaluations[:2]  # the checkpoint is older than the end
    hollow = [(u, Evaluation(e.scores, e.kl, e.diversity, torch.empty(0))) for u, e in evaluations]
    again.rewind(log, hollow)
    assert [row["update"] for row in lines(tmp_path / "log.jsonl")] == list(range(1, 9))
    assert [row["update"] for row in lines(tmp_path / "evaluations.jsonl")] == [0, 5]
    assert sorted(p.stem for p in (tmp_path / "samples").iterdir()) == ["000000", "000005"]
    more, later = play(again, 9, 20)
    finish(again, log + more, hollow + later)
    for name in ("log.jsonl", "evaluations.jsonl"):
        assert (tmp_path / name).read_text() == (finished.out / name).read_text()
    for name in ("samples/000020.png", "before_after.png"):
        assert (tmp_path / name).read_bytes() == (finished.out / name).read_bytes()
    mine, theirs = (strict((out / "result.json").read_text()) for out in (tmp_path, finished.out))
    assert mine["evaluations"] == theirs["evaluations"]
    assert "20/20" in capsys.readouterr().err


def test_lines_that_could_not_be_written_are_written_later(tmp_path, monkeypatch, caplog):
    report, real = made(tmp_path), type(tmp_path).open

    def full(self, mode="r", *args, **kwargs):
        file = real(self, mode, *args, **kwargs)
        if self.name.startswith("log.jsonl") and mode != "r":
            file.write('{"upd')
            file.close()
            raise OSError(28, "No space left on device")
        return file

    report.row({"update": 1}, 4)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(type(tmp_path), "open", full)
        report.row({"update": 2}, 4)
        report.row({"update": 3}, 4)
    assert caplog.text.count("No space left") == 1
    report.row({"update": 4}, 4)
    assert lines(tmp_path / "log.jsonl") == [{"update": u} for u in (1, 2, 3, 4)]


# Runs that are short of something


@pytest.mark.parametrize("updates", [0, 4])
def test_a_single_evaluation_is_enough(tmp_path, updates):
    report = made(tmp_path)
    finish(report, *play(report, 1, updates), "interrupted")
    result = strict((tmp_path / "result.json").read_text())
    assert (result["best"], result["updates"], result["stopped"]) == (0, updates, "interrupted")
    assert not (tmp_path / "before_after.png").exists()
    assert is_drawn(tmp_path / "curves.png")
    assert "The run ended early: interrupted" in (tmp_path / "README.md").read_text()


def test_a_run_stopped_within_its_first_evaluation(tmp_path, caplog):
    finish(made(tmp_path), [], [], "interrupted")
    assert strict((tmp_path / "result.json").read_text())["evaluations"] == []
    assert "before its first evaluation" in (tmp_path / "README.md").read_text()
    assert not caplog.records


def test_scores_that_are_all_missing(tmp_path, caplog):
    report = made(tmp_path)
    finish(report, *play(report, 1, 10, hollow=True))
    result = strict((tmp_path / "result.json").read_text())
    assert result["evaluations"][1]["gains"]["gold"] == [None, None]
    assert (tmp_path / "README.md").is_file()
    assert not caplog.records


@pytest.mark.parametrize("names", [("gold",), ("CLIPScore", "gold")])
def test_no_optimised_reward(tmp_path, names, caplog):
    report = made(tmp_path, optimised=None)
    finish(report, *play(report, 1, 10, names=names))
    assert strict((tmp_path / "result.json").read_text())["over_optimised"] == []
    assert is_drawn(tmp_path / "curves.png")
    assert not caplog.records


def test_states_that_are_no_images_have_no_pictures(tmp_path, caplog):
    report = made(tmp_path, "tensorboard")
    finish(report, *play(report, 1, 10, images=False))
    assert not (tmp_path / "samples").exists()
    assert not (tmp_path / "before_after.png").exists()
    assert "pipeline_tag" not in (tmp_path / "README.md").read_text()
    assert not caplog.records


def test_what_cannot_be_drawn_does_not_lose_the_run(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("no ink")

    for name in ("sheet_of", "sheet", "draw_curves", "write_card"):
        monkeypatch.setattr(reports, name, fail)
    report = made(tmp_path)
    finish(report, *play(report, 1, 10))
    assert strict((tmp_path / "result.json").read_text())["best"] == 10
    assert caplog.text.count("no ink") == 5  # three sheets, the curves, the card


# Pictures


def test_tiles_come_back_from_a_sheet_as_they_were(tmp_path):
    media = (torch.rand(N, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    scores = {"gold": torch.linspace(0, 1, N)}
    drawn, boxes = pictures.sheet_of(media, scores, PROMPTS, SAMPLES, {"gold": "#000000"}, "title", "sub")
    pictures.write_sheet(drawn, boxes, tmp_path / "a.png")
    tiles = pictures.read_tiles(tmp_path / "a.png")
    assert [len(row) for row in tiles] == [SAMPLES] * len(PROMPTS)
    for p, row in enumerate(tiles):
        for s, tile in enumerate(row):
            assert tile.size == (128, 128)
            assert (
                tile.resize((32, 32), Image.Resampling.NEAREST).tobytes()
                == pictures.to_pil(media[p * SAMPLES + s]).tobytes()
            )


def test_a_sheet_shows_at_most_eight_prompts_of_eight_samples():
    media = torch.rand(10 * 9, 3, 16, 8)
    picture, boxes = pictures.sheet_of(media, {}, [str(i) for i in range(10)], 9, {"gold": "#000000"}, "title")
    assert [len(row) for row in boxes] == [8] * 8
    assert all(x + w <= picture.width and y + h <= picture.height for row in boxes for x, y, w, h in row)
    assert all(h == 2 * w for row in boxes for *_, w, h in row)


def test_pixels_that_are_not_finite_are_black():
    media = torch.full((1, 3, 16, 16), math.nan)
    picture, boxes = pictures.sheet_of(media, {}, ["a"], 1, {}, "title")
    x, y, w, h = boxes[0][0]
    assert picture.crop((x, y, x + w, y + h)).getextrema() == ((0, 0),) * 3


def test_before_and_after_are_the_first_and_the_best(finished):
    before, after = (pictures.read_tiles(finished.out / "samples" / name) for name in ("000000.png", "000010.png"))
    both = pictures.read_tiles(finished.out / "before_after.png")
    for p in range(len(PROMPTS)):
        assert [t.tobytes() for t in both[p]] == [t.tobytes() for t in before[p] + after[p]]
    assert is_drawn(finished.out / "before_after.png")


def test_curves_are_drawn_in_the_colours_of_the_captions(finished):
    assert is_drawn(finished.out / "curves.png")
    with Image.open(finished.out / "curves.png") as image:
        assert image.width > 1000
        seen = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    for ink in pictures.INKS.values():
        assert tuple(bytes.fromhex(ink[1:])) in seen


def test_curves_leave_matplotlib_as_it_was(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    curves.draw_curves(tmp_path / "c.png", "a title " * 40, [], [(0, evaluation(0))], SAMPLES, "gold", None, 0)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "–"),
        (0.0, "0"),
        (0.2814, "0.281"),
        (-1.236, "−1.24"),
        (23.46, "23.5"),
        (512.3, "512"),
        (1e-5, "1e−05"),
    ],
)
def test_numbers_are_short(value, text):
    assert pictures.shown(value) == text


# The card


def test_the_card_is_in_the_hub_format(finished):
    from huggingface_hub import ModelCard

    text = (finished.out / "README.md").read_text()
    data = ModelCard(text).data
    assert data.base_model == "someone/some-model"
    assert data.library_name == "diffusers"
    assert data.tags == ["lora", "kilter", "Backprop"]
    assert "| `gold` (judge) |" in text
    assert "| `CLIPScore` (optimised) |" in text
    assert "Over-optimisation was noticed" in text
    assert "at update 15, 20" in text
    assert f"pipe.load_lora_weights('{finished.out}')" in text
    assert f"--lora {finished.out}" in text
    for picture in ("before_after.png", "curves.png"):
        assert f"]({picture})" in text
    block = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block)["train"] == DESCRIPTION["train"]
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_a_card_for_weights_of_a_local_base(tmp_path, finished):
    result = strict((finished.out / "result.json").read_text())
    result["config"]["policy"]["model"] = str(tmp_path)
    write_card(tmp_path, result)
    text = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in front
    assert "lora" not in front["tags"]
    assert "trainable.safetensors" in text
    assert "load_lora_weights" not in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_the_card_of_an_adapter_in_pefts_format_says_how_to_load_it(tmp_path, finished):
    (tmp_path / "adapter_model.safetensors").touch()
    write_card(tmp_path, strict((finished.out / "result.json").read_text()))
    text = (tmp_path / "README.md").read_text()
    assert "lora" in yaml.safe_load(text.split("---")[1])["tags"]
    code = text.split("```python\n")[1].split("```")[0]
    assert f"PeftModel.from_pretrained(pipe.transformer, '{tmp_path}')" in code and "from peft" in code
    assert "load_lora_weights" not in text and f"--lora {tmp_path}" in text
    compile(code, "card", "exec")


def test_the_code_of_a_card_runs_as_written_where_an_encoder_is_absent(tmp_path, finished):
    sd3.VARIANTS["without T5"]().save_pretrained(tmp_path / "model")
    policy = load_policy(tmp_path / "model", device="cpu")
    add_lora(policy, Lora(rank=1), seed=0)
    save_adapter(policy, tmp_path)
    result = strict((finished.out / "result.json").read_text())
    result["config"]["policy"]["model"] = str(tmp_path / "model")
    sampling = Sampling.of(policy, steps=2, guidance=3.0, size=(32, 48))
    result["pipeline"] = plain_use(policy, sampling, Prompt("a cat", negative="a dog"))
    write_card(tmp_path, json.loads(json.dumps(result)))
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "text_encoder_3=None, tokenizer_3=None" in code and "max_sequence_length=" in code
    made: dict = {}
    exec(code, made)
    assert made["image"].size == (48, 32)


@pytest.mark.parametrize("student", ["lcm", "trailing"])
def test_the_code_of_a_card_gives_a_student_its_schedule(tmp_path, finished, student):
    sd.VARIANTS["1.5"]().save_pretrained(tmp_path / "model")
    result = strict((finished.out / "result.json").read_text())
    policy = load_policy(tmp_path / "model", student=student, device="cpu")
    result["config"]["policy"] |= {"model": str(tmp_path / "model"), "student": student}
    result["pipeline"] = plain_use(policy, Sampling.of(policy, steps=2, guidance=1.0), Prompt("a cat"))
    add_lora(policy, Lora(rank=1), seed=0)
    save_adapter(policy, tmp_path)
    write_card(tmp_path, result)
    text = (tmp_path / "README.md").read_text()
    made: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], made)
    schedule = made["pipe"].scheduler
    assert type(schedule) is type(policy.scheduler)
    assert schedule.timesteps.tolist() == policy.levels(2).t[:-1].tolist()
    assert f"--student={student}" in text


def test_the_code_of_a_card_counts_guidance_as_the_pipeline_does():
    prompt = Prompt("a cat", negative="a dog")
    calls = []
    for policy in (QwenImage(qwen_image.pipeline()), ZImage(z_image.pipeline()), StableDiffusion3(sd3.build())):
        calls.append(plain_use(policy, Sampling.of(policy, steps=2, guidance=3.0), prompt)["call"])
    assert [call.get("guidance_scale") for call in calls] == [None, 2.0, 3.0]
    assert calls[0]["true_cfg_scale"] == 3.0
    assert all(call["negative_prompt"] == "a dog" and call["num_inference_steps"] == 2 for call in calls)
    assert plain_use(GaussianPolicy([0.0]), Sampling.of(GaussianPolicy([0.0]), steps=2), prompt) == {}


def test_the_card_of_a_noise_hypernetwork_says_how_to_sample_with_it(tmp_path, finished):
    result = strict((finished.out / "result.json").read_text())
    result["config"]["objective"]["class_path"] = "align.objectives.hypernoise.HyperNoise"
    write_card(tmp_path, result)
    text = (tmp_path / "README.md").read_text()
    assert f"--lora {tmp_path}" in text
    assert "--steering=ShiftedNoise" in text
    assert "load_lora_weights" not in text


# Trackers


def test_tensorboard_has_numbers_pictures_and_the_configuration(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.out / "tracker"), size_guidance={"images": 0}).Reload()
    scalars = events.Tags()["scalars"]
    assert {"train/reward", "train/loss", "eval/gold", "eval/kl"} <= set(scalars)
    assert [e.step for e in events.Scalars("train/reward")] == list(range(1, 21))
    assert 3 not in [e.step for e in events.Scalars("train/loss")]
    assert [e.step for e in events.Images("samples")] == [0, 5, 10, 15, 20]
    (written,) = (finished.out / "tracker").rglob("hparams.yml")
    assert yaml.safe_load(written.read_text())["train.learning_rate"] == 3e-4


def test_descriptions_become_one_level_of_plain_values():
    flat = trackers.flatten(DESCRIPTION)
    assert flat["objective"] == "align.objectives.backprop.Backprop"
    assert flat["train.learning_rate"] == 3e-4
    assert "objective.note" not in flat
    assert all(isinstance(v, (bool, int, float, str)) for v in flat.values())
    assert len(flat["source.prompts"]) == trackers.LONGEST


def test_unknown_and_missing_trackers_are_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"one of \[.*'wandb'.*got 'tensorbord'; did you mean 'tensorboard'"):
        made(tmp_path, "tensorbord")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install comet-ml"):
        made(tmp_path, "comet_ml")
    assert not list(tmp_path.iterdir())


def test_every_tracker_of_accelerate_has_a_package():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert LOGGER_TYPE_TO_CLASS.keys() <= trackers.PACKAGES.keys()


@pytest.mark.parametrize("moment", ["start", "log", "log_images"])
def test_a_tracker_that_fails_is_said_once_and_training_goes_on(tmp_path, moment, monkeypatch, caplog):
    from accelerate.tracking import TensorBoardTracker

    def fail(*args, **kwargs):
        raise ConnectionError("the network is down")

    monkeypatch.setattr(TensorBoardTracker, moment, fail)
    report = made(tmp_path, "tensorboard")
    finish(report, *play(report, 1, 10))
    assert caplog.text.count("the network is down") == 1
    assert len(lines(tmp_path / "log.jsonl")) == 10


def test_a_registered_tracker_gets_the_same_numbers(tmp_path, monkeypatch):
    from accelerate import tracking

    class Mine(tracking.GeneralTracker):
        name, requires_logging_directory = "mine", True
        seen: list = []  # noqa: RUF012

        def __init__(self, run_name, logging_dir):
            super().__init__()
            self.seen.append((run_name, logging_dir))

        @property
        def tracker(self):
            return None

        def log(self, values, step=None, **kwargs):
            self.seen.append((step, values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mine", Mine)
    report = made(tmp_path, "mine")
    finish(report, *play(report, 1, 1))
    assert Mine.seen[0] == ("kilter", str(tmp_path / "tracker"))
    assert Mine.seen[2] == (1, {"train/loss": -0.1, "train/reward": 0.1, "train/seconds": 0.25})


def test_a_resumed_tensorboard_hides_what_is_written_again(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    report = made(tmp_path, "tensorboard")
    log, evaluations = play(report, 1, 9)
    report.tracker.finish()
    again = made(tmp_path, "tensorboard")
    again.rewind(log[:6], evaluations[:2])
    play(again, 7, 10)
    again.tracker.finish()
    files = (tmp_path / "tracker").glob("events.*")
    starts = {e.step for file in files for e in EventFileLoader(str(file)).Load() if e.HasField("session_log")}
    assert starts == {7}


def test_reports_import_nothing_heavy():
    code = "import align.reports, sys; print(sorted({'matplotlib', 'tensorboard', 'accelerate', 'tqdm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout.replace("'", '"'))) <= {"tqdm"}
