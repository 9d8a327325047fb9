"""The laws of the repository: who may import whom, one loop, configs that load, nothing public without test and README row."""

import ast
import inspect
import io
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from PIL import Image

import align
import rewards
import samplers
from align import feedback, objectives, sources
from align.catalogue import table
from align.commands.train import parser as train_parser
from align.config import NAMES
from align.parsing import COMPONENTS, build_parser, concrete
from align.sampling import Sampling
from align.world import World

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rewards", "samplers", "align")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
HEAVY = {"diffusers", "transformers", "open_clip", "gradio", "matplotlib", "peft", "accelerate", "datasets"}
SHARED = {
    "answers",
    "base",
    "composite",
    "dual",
    "files",
    "heads",
    "judging",
    "loading",
    "localjudge",
    "preprocess",
    "qwen",
    "specimens",
    "wire",
}  # what every reward backend may use
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
STEER = [p for p in CONFIGS if p.parent.name == "steer" or p.name == "steer.yaml"]
LAUNCH = [p for p in CONFIGS if p.parent.name == "accelerate"]
LEARN = [p for p in CONFIGS if p.stem.startswith("train_reward")]
FORETELL = [p for p in CONFIGS if p.stem.startswith("train_value")]
TRAIN = [p for p in CONFIGS if p not in STEER + LAUNCH + LEARN + FORETELL]
EXPORTED = {name for module in (rewards, samplers, objectives, sources, feedback) for name in module.__all__}


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Absolute names of the modules a file imports."""
    tree = ast.parse(path.read_text())
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found = set()
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            found.add(".".join([*base, node.module] if node.module else base))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_flow_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    forbidden = {"rewards": {"samplers", "align"}, "samplers": {"align"}, "align": set()}[package]
    used = imports(path)
    assert not {name.split(".")[0] for name in used} & forbidden
    if package == "samplers":
        assert {name for name in used if name.split(".")[0] == "rewards"} <= {"rewards.base"}
    if path.parent.name == "families" and path.stem != "__init__":
        assert not {name for name in used if name.startswith("samplers.families.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_are_imported_where_they_are_used(path):
    assert not {name.split(".")[0] for name in imports(path, top_level=True)} & HEAVY


def test_reward_backends_do_not_import_one_another():
    for path in (ROOT / "rewards").glob("*.py"):
        if path.stem != "__init__":
            siblings = {name.split(".")[1] for name in imports(path) if name.startswith("rewards.")}
            assert siblings <= SHARED, f"{path.name} imports {siblings - SHARED}"


def test_importing_loads_nothing_heavy_and_is_quick():
    code = "import time, torch, sys; t = time.perf_counter(); import rewards; print(time.perf_counter() - t);"
    code += f"import samplers, align; print(sorted({HEAVY!r} & set(sys.modules)))"
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    seconds = min(float(r.stdout.splitlines()[0]) for r in runs)
    assert seconds < 0.2
    assert runs[0].stdout.splitlines()[1] == "[]"


def test_one_denoising_loop():
    """No loop but the rollout's asks a policy, a network or a pipeline for the next estimate, or steps a scheduler."""
    asks = {"denoise", "predict", "unet", "network"}
    for path in SOURCES + sorted((ROOT / "assets").rglob("*.py")):
        loops = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.For, ast.While))]
        for loop in loops:
            over = ast.unparse(loop.iter) if isinstance(loop, ast.For) else ""
            calls = {
                n.func.attr for n in ast.walk(loop) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
            }
            walks = "timesteps" in over or "levels" in over
            if path != ROOT / "samplers" / "rollout.py":
                assert not (walks and calls & asks), f"{path}:{loop.lineno} is a second denoising loop"
                assert "scheduler.step" not in ast.unparse(loop), f"{path}:{loop.lineno} steps a scheduler"
    loop = inspect.getsource(samplers.rollout)
    assert "for i in range(levels.steps)" in loop


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    lines = len(path.read_text().splitlines())
    assert lines <= (150 if path.parent.name == "families" else 420)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_every_config_cites_and_is_short(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# "), "the first line says where the numbers come from"
    assert len(lines) <= 30
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("path", STEER, ids=relative)
def test_every_steering_config_loads(path):
    parsed = build_parser().parse_args(["steer", "--config", str(path), "a prompt"])
    assert parsed.steer.steering.class_path


@pytest.mark.parametrize("path", LEARN, ids=relative)
def test_every_reward_training_config_loads(path, monkeypatch):
    """Encoder, head and loss are made; the preferences are there."""
    monkeypatch.chdir(ROOT)
    parser = build_parser()
    parsed = parser.parse_args(["train-reward", "--config", str(path)])
    options = parser.instantiate(parsed)["train-reward"]
    assert options.encoder.needs_prompt
    assert options.loss.needs_variance <= getattr(options.head, "variance", False)
    assert all(Path(data).exists() for data in (options.preferences, options.heldout) if data)


@pytest.mark.parametrize("path", FORETELL, ids=relative)
def test_every_value_training_config_loads(path):
    """The reward is made, and the settings fit each other."""
    parser = build_parser()
    parsed = parser.parse_args(["train-value", "--config", str(path)])
    options = parser.instantiate(parsed)["train-value"]
    assert options.reward is not None or options.preferences
    assert align.ValueConfig(**{f.name: options[f.name] for f in fields(align.ValueConfig)})


class Judge(rewards.Reward):
    """Stands in for rewards whose weights would have to be downloaded."""

    def measure(self, media, prompts):
        return media.mean((1, 2, 3))


@pytest.fixture(scope="session")
def pick_a_pic(tmp_path_factory):
    """Two pairs in the columns of Pick-a-Pic, which stand in for a data set of the hub."""
    from datasets import Dataset

    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    other = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(other, "PNG")
    columns = {
        "caption": ["a cat", "a dog"],
        "jpg_0": [picture.getvalue()] * 2,
        "jpg_1": [other.getvalue()] * 2,
        "label_0": [1.0, 0.0],
        "label_1": [0.0, 1.0],
    }
    file = tmp_path_factory.mktemp("feedback") / "train.parquet"
    Dataset.from_dict(columns).to_parquet(file)
    return str(file)


@pytest.fixture(scope="session")
def embedded():
    return align.load_policy(device="cpu")


@pytest.mark.parametrize("path", TRAIN, ids=relative)
def test_every_training_config_loads_and_fits(path, embedded, pick_a_pic, monkeypatch):
    """Objective, source and settings are made and fit each other; rewards are parsed only."""
    monkeypatch.chdir(ROOT)  # prompt files are named from there
    parser = train_parser()
    parser.exit_on_error = False
    options = parser.parse_args(["--config", str(path)])
    data = options.source.init_args.get("path")
    if data and not Path(data).exists():
        options.source.init_args.path = pick_a_pic
    assert (options.reward is None) == (data is not None), "rollouts and prompts need a reward, data need none"
    options.reward, options.panel = None, []
    built = parser.instantiate(options)
    config = align.TrainConfig(**{name: built[name] for name in NAMES})
    objective, source = (part.bind(Judge()) for part in (built.objective, built.source))
    objective.check(embedded)
    assert source.makes in objective.takes
    assert set(objective.needs) <= set(source.columns)
    assert source.members == objective.members or (objective.members == 0 and source.members > 1)
    sampling = Sampling.of(embedded, config.kernel, config.steps, config.guidance)
    source.check(sources.Run(embedded, sampling, World(cpu=True), 0, config.batch, samplers.Ledger()))
    objective.check_source(source, sampling)


def test_the_readme_has_the_catalogue_of_rewards():
    assert table() in (ROOT / "README.md").read_text(), "write it: python -m align.catalogue"


@pytest.mark.parametrize("kind", sorted(COMPONENTS))
def test_every_component_has_a_test_a_readme_row_and_a_one_line_description(kind):
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    readme = (ROOT / "README.md").read_text()
    for cls in concrete(COMPONENTS[kind]):
        if cls.__name__ in EXPORTED:
            assert cls.__name__ in tests, f"no test names {cls.__name__}"
            assert f"`{cls.__name__}" in readme, f"README has no row for {cls.__name__}"
            first = (inspect.getdoc(cls) or "").splitlines()[0]
            assert first.endswith(".") and len(first) <= 130, cls
