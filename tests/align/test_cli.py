"""The command line, in process where it can be and as a real process where it must be."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from align.cli import main
from align.parsing import build_parser
from align.prompts import read_prompts
from samplers import SVDD, Steering

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--reward", "Brightness", "--particles", "2", "--steps", "3"]


def kilter(capsys, *argv):
    """Exit code, standard output and standard error of one command."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def steer(capsys, tiny_folder, tmp_path):
    return lambda *argv: kilter(capsys, "steer", "--model", tiny_folder, "--out", tmp_path / "run", *QUICK, *argv)


def test_steer_writes_a_run_and_prints_what_it_wrote(steer, tmp_path):
    code, out, err = steer("a cat", "--steering", "FeynmanKac", "--steering.beta", "0.01", "--seed", 3, "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert printed == json.loads((tmp_path / "run" / "result.json").read_text())
    assert printed["config"]["steering"]["init_args"]["beta"] == 0.01
    assert [s["seed"] for s in printed["samples"]] == [3, 4, 3, 4]
    assert "Brightness" in err
    assert "grid.png" in err
    assert all((tmp_path / "run" / s["image"]).is_file() for s in printed["samples"])


def test_every_kind_of_steering_and_kernel_is_reachable(steer):
    for choice in (
        ["--steering", "BestOfN", "--kernel", "ODE"],
        ["--steering", "SVDD", "--steering.children", "2", "--kernel", "CPS", "--kernel.eta", "0.5"],
        ["--steering", "CoDe", "--steering.block", "2"],
        ["--steering", "Guided", "--steering.scale", "2", "--guidance", "1"],
        ["--steering", "Compose", "--steering.a", "Guided", "--steering.b", "FeynmanKac", "--steering.b.beta", "0.1"],
        ["--steering", "FeynmanKac", "--steering.potential", "max", "--plain", "false", "--size", "[16,24]"],
        ["--steering", "FeynmanKac", "--steering.reward", "Sharpness", "--panel+", "Colour"],
    ):
        code, _, err = steer("a cat", "--overwrite", *choice)
        assert code == 0, f"{choice}: {err}"


def test_a_budget_buys_particles_and_compares_methods(steer, tmp_path):
    code, out, err = steer("auto", "--particles", "null", "--budget", "50nfe", "--steering", "auto", "--json")
    assert code == 0, err
    assert "1 chain × 1 prompt × 3 steps × 2 branches" in err
    written = json.loads(out)
    assert written["config"]["budget"] == "50nfe"
    assert written["samples"][0]["prompt"] == "auto"
    assert written["ledger"]["budget"]["spent"] == 48
    again = ["--overwrite", "--particles", "null", "--budget", "50nfe"]
    how = '{"class_path": "FeynmanKac", "init_args": {"beta": 0.02}}'
    code, out, err = steer("a cat", "a dog", *again, "--json", "--compare", "BestOfN", how, "Auto")
    assert code == 0, err
    assert [row["method"] for row in json.loads(out)["table"]] == ["unsteered", "BestOfN", "FeynmanKac", "Auto"]
    assert json.loads(out)["methods"]["FeynmanKac"]["config"]["steering"]["init_args"]["beta"] == 0.02
    assert "| Auto | 1 | 48 |" in (tmp_path / "run" / "comparison.md").read_text()
    for argv, said in (
        (["--compare", "BestOfN"], "two methods"),
        (["--compare", "BestOfN", "FeynmenKac"], "FeynmanKac"),
    ):
        code, _, err = steer("a cat", *again, *argv)
        assert code == 2
        assert said in err
    code, _, err = steer("a cat", "--overwrite", "--compare", "BestOfN", "Auto")
    assert code == 2
    assert "pass --budget" in err


def test_a_printed_config_repeats_the_run(capsys, steer, tiny_folder, tmp_path):
    assert steer("a cat", "--seed", 11, "--steering.beta", "0.3")[0] == 0
    argv = ["a cat", "--model", tiny_folder, *QUICK, "--seed", 11, "--steering.beta", "0.3", "--print_config"]
    code, out, _ = kilter(capsys, "steer", *argv)
    assert code == 0
    (tmp_path / "again.yaml").write_text(out)
    code, _, err = kilter(capsys, "steer", "--config", tmp_path / "again.yaml", "--out", tmp_path / "again")
    assert code == 0, err
    for image in (tmp_path / "run" / "images").iterdir():
        assert image.read_bytes() == (tmp_path / "again" / "images" / image.name).read_bytes()


def test_the_line_overrides_the_file_wherever_it_stands(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("prompts: [from file]\nseed: 5\nparticles: 3\n")
    for argv in (
        ["mine", "--seed", 7, "--config", tmp_path / "c.yaml"],
        ["--config", tmp_path / "c.yaml", "mine", "--seed", 7],
        ["mine", f"--config={tmp_path / 'c.yaml'}", "--seed", 7],
    ):
        out = kilter(capsys, "steer", *argv, "--print_config")[1]
        assert "prompts:\n- mine\n" in out
        assert "seed: 7\n" in out
        assert "particles: 3\n" in out
    assert "- from file" in kilter(capsys, "steer", "--config", tmp_path / "c.yaml", "--print_config")[1]


def test_choosing_another_steering_inherits_nothing(capsys):
    """SVDD gets its own default temperature, not that of the default FeynmanKac."""
    out = kilter(capsys, "steer", "x", "--steering", "SVDD", "--print_config")[1]
    assert f"beta: {SVDD().beta}\n" in out


def test_prompts_from_files(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n two dogs \n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "rain", "negative": "sun", "task": "colors"}\n')
    prompts = read_prompts(["first", str(tmp_path / "p.txt"), str(tmp_path / "p.jsonl")])
    assert [p.text for p in prompts] == ["first", "a cat", "two dogs", "rain"]
    assert (prompts[3].negative, prompts[3].meta["task"]) == ("sun", "colors")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2 must be a JSON object with a \"prompt\""):
        read_prompts([str(tmp_path / "bad.jsonl")])
    for row in ('{"prompt": 5}', '{"prompt": "x", "negative": 3}', "[1]", "{"):
        (tmp_path / "bad.jsonl").write_text(row)
        with pytest.raises(ValueError, match=r"bad.jsonl:1"):
            read_prompts([str(tmp_path / "bad.jsonl")])
    (tmp_path / "p.csv").write_text("a,b")
    with pytest.raises(ValueError, match="prompt files are"):
        read_prompts([str(tmp_path / "p.csv")])
    (tmp_path / "bom.txt").write_bytes("\ufeffein Käfer\n".encode())
    assert [p.text for p in read_prompts([str(tmp_path / "bom.txt")])] == ["ein Käfer"]
    assert [p.text for p in read_prompts(["what is in a readme.txt"])] == ["what is in a readme.txt"]


def test_results_are_not_replaced_by_accident(steer, tmp_path):
    assert steer("a cat")[0] == 0
    before = (tmp_path / "run" / "result.json").read_bytes()
    code, _, err = steer("a dog")
    assert code == 2
    assert "--overwrite" in err
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    assert steer("a dog", "--overwrite", "--seed", 900)[0] == 0
    images = {p.name for p in (tmp_path / "run" / "images").iterdir()}
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert images == {Path(s["image"]).name for s in written["samples"]}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["a", "--steering", "FeynmenKac"], "Did you mean 'FeynmanKac'"),
        (["a", "--reward", "Britness"], "Did you mean 'Brightness'"),
        (["a", "--partcles", "3"], "Did you mean 'particles'"),
        (["a", "--steering.potentail", "max"], "Did you mean 'potential'"),
        (["a", "--steering.potential", "most"], "'difference', 'max', 'sum', 'terminal'"),
        (["a", "--particles", "0"], "particles must"),
        (["a", "--particles", "many"], "particles"),
        (["a", "--steering.beta", "-1"], "beta must"),
        (["a", "--steps", "0"], "steps must"),
        (["a", "--kernel", "ODE"], "deterministic"),
        (["a", "--kernel", "DDIM", "--kernel.eta", "3"], "eta must lie in"),
        (["a", "--size", "[15,16]"], "multiples of"),
        ([], "no prompts"),
        ([""], "is empty"),
        (["absent.txt"], "no prompt file"),
        (["a", "--model", "/no/such/model"], "no folder"),
        (["a", "--steering", "Guided", "--reward", "JPEGSize"], "needs the gradient"),
        (["a", "--reward", "Framewise", "--reward.reward", "Brightness"], "scores video, but the model makes image"),
        (["a", "--steering", "CoDe", "--steering.block", "0"], "block must"),
    ],
)
def test_bad_input_is_exit_code_2_and_leaves_nothing(steer, tmp_path, argv, said):
    code, out, err = steer(*argv)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_named(capsys, tiny_folder, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = kilter(capsys, "steer", "a", "--model", tiny_folder, *QUICK, "--out", tmp_path / "file" / "run")
    assert code == 2
    assert "cannot write to" in err


def test_score_prints_a_table_or_json_lines(capsys, tmp_path):
    for i, level in enumerate((0, 128, 255)):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{i}.png")
    images = sorted(tmp_path.glob("*.png"))
    code, out, _ = kilter(capsys, "score", *images, "--reward", "Brightness", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [r["image"] for r in rows] == [str(p) for p in images]
    assert [round(r["Brightness"], 3) for r in rows] == [0.0, 0.502, 1.0]
    code, out, _ = kilter(capsys, "score", *images, "--reward", "Brightness")
    assert [line.split()[0] for line in out.splitlines()] == [str(p) for p in images]
    code, out, err = kilter(capsys, "score", *images, "--reward", "Brightness", "--prompts", "a", "b")
    assert (code, out) == (2, "")
    assert "2 prompts for 3 images" in err
    (tmp_path / "corrupt.png").write_bytes(b"no image")
    code, out, err = kilter(capsys, "score", tmp_path / "corrupt.png", "--reward", "Brightness")
    assert (code, out) == (2, "")
    assert "corrupt.png is not an image" in err


def test_list_shows_every_choice_on_one_line(capsys):
    code, out, _ = kilter(capsys, "list")
    assert code == 0
    for word in ("FeynmanKac", "BestOfN", "DDIM", "FlowSDE", "CLIPScore", "Brightness", "StableDiffusionPipeline"):
        assert sum(line.strip().startswith(word + " ") for line in out.splitlines()) == 1
    assert "DDIM" not in kilter(capsys, "list", "rewards")[1]


def test_ctrl_c_keeps_partial_results(tiny_folder, tmp_path):
    """A real process, a real signal: it exits with 130 and leaves a readable, marked result."""
    argv = [sys.executable, "-m", "align.cli", "steer", "a cat", "--model", tiny_folder, "--reward", "Brightness"]
    argv += ["--steps", "900", "--particles", "2", "--out", tmp_path / "run"]
    listen = functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a background shell makes children deaf to it
    process = subprocess.Popen([str(a) for a in argv], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    seen = ""
    deadline = time.monotonic() + 120
    while not re.search(r"\b[1-9]\d*/1800", seen) and time.monotonic() < deadline:  # the first steps are done
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["stopped"].startswith("stopped at step")
    assert written["samples"]
    assert "Traceback" not in err


def test_the_installed_command_starts(tiny_folder):
    script = Path(sys.executable).parent / "kilter"
    done = subprocess.run([script, "steer", "--help"], capture_output=True, text=True, check=True, cwd="/")
    assert "--particles" in done.stdout


def test_a_stranger_named_rewards_is_reported(tmp_path):
    (tmp_path / "rewards.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import align"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode != 0
    assert "ImportError: kilter needs its own package 'rewards'" in done.stderr
    assert str(tmp_path / "rewards.py") in done.stderr


def test_a_reader_who_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m align.cli list rewards --json | head -c 10"
    shell = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert shell.stdout == '{"name": "' and shell.stderr == ""


class Clashing(Steering):
    """Has arguments of the same names as the steering that is chosen by default, with other defaults."""

    def __init__(self, beta: float = 3.0, every: int = 7, own: int = 1):
        self.beta, self.every, self.own = beta, every, own


def test_a_chosen_component_has_its_own_defaults():
    """Not those of the class it stands in for; what was said for it stays."""
    parser, name = build_parser(), f"{__name__}.Clashing"
    for said, beta in ([], 3.0), (["--steering.beta", "2"], 2.0):
        taken = parser.parse_args(["steer", "a", "--steering", name, *said]).steer.steering
        assert taken.init_args.as_dict() == {"beta": beta, "every": 7, "own": 1}
    plain = parser.parse_args(["steer", "a", "--steering.beta", "2"]).steer.steering
    assert (plain.class_path, plain.init_args.beta) == ("samplers.FeynmanKac", 2.0)
