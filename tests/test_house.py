"""The house: imports run one way, names and sentences are plain, types hold, old weights load."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import (
    HERE,
    SMALL,
    last_tensors,
    part,
    run_error,
    striped,
    studied,
    study_error,
    write_png,
)
from PIL import Image

import checkpoints
import eval as evaluation
import train
from weights import load_generator

# A file imports only files that stand before it.
ORDER = (
    *(
        "losses",
        "clan",
        "models",
        "baselines",
        "alignment",
        "selftrain",
        "methods",
        "classes",
        "streets",
    ),
    *(
        "folders",
        "data",
        "checkpoints",
        "weights",
        "devices",
        "compilation",
        "settings",
        "runlog",
        "export",
    ),
    *(
        "predictions",
        "eval",
        "train",
        "runs",
        "figures",
        "tuning",
        "control",
        "tables",
        "trust",
        "second",
        "study",
    ),
    *("measure", "gpu", "bench"),
)


def wrong_imports(sources: dict[str, str], order: tuple[str, ...]) -> list[str]:
    """'a imports b' for each import, also within functions, of a file that stands later."""
    wrong = []
    for name, text in sources.items():
        imported = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
        above = order[: order.index(name)]
        wrong += [f"{name} imports {x}" for x in sorted(imported & {*order} - {*above})]
    return wrong


def programs() -> dict[str, str]:
    paths = sorted(p for p in HERE.glob("*.py") if not p.name.startswith("test_"))
    return {path.stem: path.read_text() for path in paths}


def test_house_imports_run_one_way():
    sources = programs()
    assert sources.keys() == set(ORDER), "a new file: give it a place in ORDER and CONTRIBUTING.md"
    assert wrong_imports(sources, ORDER) == []


def test_house_the_check_of_imports_sees_a_circle():
    sources = {"a": "x = 1", "b": "import a", "c": "from b import y\n\ndef f():\n    import d"}
    sources |= {"d": "import os\nimport c.part"}
    assert wrong_imports(sources, ("a", "b", "c", "d")) == ["c imports d"]
    assert wrong_imports({"a": "import a"}, ("a",)) == ["a imports a"]


# Names and sentences that were replaced. CHANGELOG.md says so, and this file lists them.

OLD_NAMES = ("weight_offset", "weight_biases", "weight_map", "weight-offset", "weight-biases")
OLD_NAMES += ("weight-map", "own_signals", "weight 0.8", "refuse_idle", "NOT_USED_BY")
OLD_SENTENCES = (
    "of dropout\n",
    "says what is learnt",
    "what is wrong in one of them shows in it",
    "Bytes travel; normalisation",
    "No flag is dead: one that",
    "in nobody's way and not lost",
    "where all have come to theirs",
    "and but for plain channels last",
    "by its parent alone, and between two runs not at all",
    "is not to be had here",
    "without a doubt",
    "its cause, said above, is mended",
    "a seed stands twice",
    "are not told apart here",
    "lower bound of the doubt",
)
OLD_VARIABLES = {"own", "beside", "there", "about", "given", "idle", "marked", "flat"}
MAY_NAME_THEM = {"CHANGELOG.md", "tests/test_house.py", "tests/same_bits.py"}


def tracked_texts() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this tree is not a git checkout")
    names = [n for n in listed.stdout.splitlines() if not n.endswith(".png")]
    return {n: (HERE / n).read_text() for n in names if (HERE / n).exists()}


def test_house_replaced_names_and_sentences_occur_nowhere():
    found = [
        f"{name}: {old}"
        for name, text in tracked_texts().items()
        for old in (*OLD_NAMES, *OLD_SENTENCES)
        if name not in MAY_NAME_THEM and old in text
    ]
    assert not found


def test_house_no_variable_of_a_program_is_a_riddle():
    for name, text in programs().items():
        nodes = list(ast.walk(ast.parse(text)))
        used = {n.id for n in nodes if isinstance(n, ast.Name)}
        used |= {n.arg for n in nodes if isinstance(n, ast.arg)}
        used |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
        assert not used & OLD_VARIABLES, name


def test_house_underscores_stand_in_streets_alone():
    for name, text in programs().items():
        nodes = ast.walk(ast.parse(text))
        kinds = (ast.FunctionDef, ast.ClassDef)
        private = [n.name for n in nodes if isinstance(n, kinds) and re.match(r"_(?!_)", n.name)]
        assert name == "streets" or not private, (name, private)


# Types.

SWAPPED = """
from clan import PAPER, Batch, Phase, g_step
from models import Discriminator, Generator

def right(G: Generator, D: Discriminator, batch: Batch, phase: Phase) -> None:
    g_step(G, D, batch, phase, PAPER)

def wrong(G: Generator, D: Discriminator, batch: Batch, phase: Phase) -> None:
    g_step(D, G, batch, phase, PAPER)
"""


@pytest.mark.slow
def test_house_types_refuse_g_and_d_in_each_others_place(tmp_path):
    """The tree itself has no type error; the swapped call has two, one for each argument."""
    path = tmp_path / "swapped.py"
    path.write_text(SWAPPED)
    command = [sys.executable, "-m", "mypy", "--config-file", str(HERE / "mypy.ini")]
    clean = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert clean.returncode == 0, clean.stdout
    result = subprocess.run([*command, str(path)], cwd=HERE, capture_output=True, text=True)
    errors = [line for line in result.stdout.splitlines() if ": error: " in line]
    assert result.returncode == 1 and len(errors) == 2, result.stdout
    assert all("swapped.py:9: " in line and "[arg-type]" in line for line in errors)
    assert "GeneratorLike" in errors[0] and "DiscriminatorLike" in errors[1]


def test_house_every_ignored_type_error_has_a_code_and_a_reason():
    for name, text in programs().items():
        for line in text.splitlines():
            if "type: ignore" in line:
                assert re.search(r"# type: ignore\[[a-z-]+\]  # \w+", line), f"{name}: {line}"


# Weights of run folders that were made before fields were renamed.

RENAMED = {"cos_offset": "weight_offset", "cos_biases": "weight_biases", "m_control": "weight_map"}


def as_older_version(path: Path) -> None:
    """Give a checkpoint the fields of the version before."""
    tensors, text = checkpoints.read_checkpoint(path)
    metadata = {k: json.loads(v) for k, v in text.items() if k != "format"}
    metadata["settings"] = {RENAMED.get(k, k): v for k, v in metadata["settings"].items()}
    checkpoints.save(path, tensors, metadata)


@pytest.fixture
def older(finished, tmp_path) -> Path:
    folder = shutil.copytree(finished, tmp_path / "older")
    for path in checkpoints.saved(folder):
        as_older_version(path)
    return folder


def test_house_an_older_run_is_not_resumed(older):
    error = run_error("--resume", str(older))
    names = "cos_biases, cos_offset, m_control, weight_biases, weight_map, weight_offset"
    assert f"made by another version of this code ({names})" in error
    assert "or its weights with --init" in error


def test_house_a_study_does_not_take_an_older_run(few, tmp_path):
    folder = studied("table", tmp_path, "--seeds", "0", "--methods", "tan")
    as_older_version(checkpoints.newest_checkpoint(folder / "streets-streets-tiny" / "tan-seed0"))
    error = study_error("table", tmp_path, "--seeds", "0", "--methods", "tan")
    assert "made by another version of this code" in error


def test_house_older_weights_still_load(older, few, tmp_path):
    """With --init, in eval.py and in eval.py predict."""
    path = checkpoints.newest_checkpoint(older)
    G, _ = load_generator(path, say=lambda _: None)
    assert set(part(last_tensors(older), "G.")) == {f"G.{name}" for name in G.state_dict()}
    flags = [*SMALL, "--init", str(path), "--lr-g", "0", "--batchnorm", "running"]
    train.main([*flags, "--out", str(tmp_path / "new")])
    for name, tensor in part(last_tensors(tmp_path / "new"), "G.").items():
        assert tensor.equal(last_tensors(older)[name])
    score = json.loads((older / "eval.json").read_text())["iou"]
    evaluation.main([str(older), "--device", "cpu"])
    assert json.loads((older / "eval.json").read_text())["iou"] == score
    write_png(tmp_path / "photos" / "a.png", striped((50, 70), range(19))[0])
    photos = ["--images", str(tmp_path / "photos"), "--out", str(tmp_path / "masks")]
    evaluation.main(["predict", str(older), *photos])
    assert Image.open(tmp_path / "masks" / "a_mask.png").size == (70, 50)
