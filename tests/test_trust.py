"""What happens when things break: damaged files, kills, locks, NaN, many processes, memory."""

import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    HERE,
    REMEDY,
    SMALL,
    assert_equal,
    before_step,
    last_tensors,
    metrics,
    replace_g_step,
    run,
    run_error,
    spoil,
    torchrun,
)
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import bench
import checkpoints
import clan
import eval as evaluation
import models
import runlog
import train
from clan import Hyper
from settings import restarted
from weights import load_weights

# Trust: what happens when things break.


def cli(*flags: str, **options) -> subprocess.Popen:
    """train.py as a process of its own, on one thread."""
    command = [sys.executable, str(HERE / "train.py"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes | options)


@pytest.mark.parametrize("how", ("empty", "half", "bit", "step"))
def test_train_resume_passes_over_a_damaged_checkpoint_and_says_so(few, tmp_path, capsys, how):
    whole, cut = run(tmp_path / "whole"), run(tmp_path / "cut")
    spoil(cut / "step_0000008.safetensors", how)
    capsys.readouterr()
    train.main(["--resume", "--out", str(cut), *SMALL])
    shown = capsys.readouterr().out
    assert "skipped and renamed to step_0000008.safetensors.damaged" in shown
    assert f"going on from {cut / 'step_0000004.safetensors'}" in shown
    assert "checksum" in shown or how not in ("bit", "step")
    assert_equal(last_tensors(cut), last_tensors(whole))
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_train_resume_without_a_whole_checkpoint_is_refused(few, tmp_path):
    out = run(tmp_path / "run")
    for path in out.glob("*.safetensors"):
        spoil(path, "half")
    assert "no checkpoint of" in run_error("--resume", str(out))


def test_train_two_runs_in_one_folder_are_refused(few, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "LOCK_WAIT", 0.1)
    with checkpoints.owned(tmp_path):
        assert f"is in use by process {os.getpid()} on" in run_error(*SMALL, "--out", str(tmp_path))
    assert not [p for p in tmp_path.iterdir() if p.name[0] != "."]
    run(tmp_path)  # free again


def test_train_a_lock_ends_with_its_process(tmp_path):
    hold = (
        "import sys, time, pathlib, checkpoints\nwith checkpoints.owned(pathlib.Path(sys.argv[1])):"
    )
    hold += "\n    print('held', flush=True)\n    time.sleep(60)"
    command = [sys.executable, "-c", hold, str(tmp_path)]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    with checkpoints.owned(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".owner").read_text()


@pytest.mark.parametrize("limit", (1_000, pytest.param(400_000, marks=pytest.mark.slow)))
def test_train_a_full_disk_ends_the_run_with_a_sentence(tmp_path, limit):
    """A limit on the size of files stands for the disk: not even a checkpoint fits."""
    resource = pytest.importorskip("resource")

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    flags = [*SMALL, "--steps", "2", "--adv-start", "1", "--out", str(tmp_path)]
    process = cli(*flags, preexec_fn=limited)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 1 and "Traceback" not in output
    assert "could not be written" in output and "make room" in output
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.tmp"))


def breaks(monkeypatch, where: str, step: int) -> None:
    """A NaN in a weight before, or in a gradient or the images at, the step after `step`."""
    g_step, due = clan.g_step, []
    before_step(monkeypatch, step, lambda: due.append(where))

    def poisoned(G, D, batch, phase, hyper):
        weight, now = G.C1.branches[0].weight, due.pop() if due else None
        if now == "weight":
            weight.data[0, 0, 0, 0] = math.nan
        if now == "image":
            images = models.normalize(batch.source, G.lineage)
            images[0, 0, 0, 0] = math.nan
            batch = batch._replace(source=images)
        result = g_step(G, D, batch, phase, hyper)
        if now == "gradient":
            weight.register_hook(lambda gradient: gradient * math.nan)
        return result

    replace_g_step(monkeypatch, poisoned)


@pytest.mark.parametrize(
    ("where", "term"), (("weight", "seg"), ("image", "seg"), ("gradient", "grad"))
)
def test_train_a_nan_is_named_with_its_step_and_term(few, tmp_path, monkeypatch, where, term):
    breaks(monkeypatch, where, 5)
    error = run_error(*SMALL, "--out", str(tmp_path), "--log-every", "100")
    assert f"{term} is not finite at step 6: " in error
    assert f"the last good checkpoint is {tmp_path / 'step_0000004.safetensors'}" in error
    assert all(v.isfinite().all() for v in last_tensors(tmp_path).values())


@pytest.mark.parametrize(
    ("source", "target", "words"),
    (
        (0.9999, 0.0001, "tells the domains apart"),
        (0.9999, 0.9999, "one answer"),
        (0.0001, 0.0001, "one answer"),
        (0.99, 0.1, None),
        (0.5, 0.5, None),
    ),
)
def test_train_warns_once_of_a_d_that_is_stuck(tmp_path, source, target, words):
    output = io.StringIO()
    console = Console(file=output, width=400)
    log = runlog.Log(tmp_path / "metrics.jsonl", 0, Hyper(steps=2000), 100_000, console)
    for step in range(1, 3 * runlog.STUCK):
        log.watch(step, {"d_source": source, "d_target": target})
        if step == runlog.STUCK - 1:
            assert not output.getvalue()
    shown = output.getvalue()
    assert shown.count("warning: ") == (words is not None)
    if words:
        assert words in shown and "try a smaller --lr-d" in shown and f"{runlog.STUCK}" in shown


def test_train_a_short_doubt_of_d_starts_the_count_anew(tmp_path):
    output = io.StringIO()
    log = runlog.Log(tmp_path / "m", 0, Hyper(steps=9), 9, Console(file=output))
    for step in range(3 * runlog.STUCK):
        sure = (step + 1) % runlog.STUCK > 0
        log.watch(step, {"d_source": 1.0 if sure else 0.9, "d_target": 0.0})
    assert not output.getvalue()


class Later:
    """A copy from the device that arrives when it is told to."""

    there = False

    def query(self) -> bool:
        return self.there

    def synchronize(self) -> None:
        self.there = True


def test_train_a_log_waits_for_no_scalar_and_loses_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = runlog.Log(path, 0, Hyper(steps=9), 1, Console(file=io.StringIO()))
    events = [Later() for _ in range(3)]
    for step, event in enumerate(events, 1):
        log.pending.append((step, ["seg"], torch.tensor([math.nan if step == 3 else 1.0]), event))
    events[1].there = True
    log.read()
    assert not metrics(tmp_path)  # the first has not arrived
    events[0].there = True
    log.read()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    with pytest.raises(FloatingPointError, match="seg is not finite at step 3"):
        log.read(wait=True)


def test_train_a_log_lets_the_host_run_ahead_only_a_few_steps(tmp_path):
    """Without an end to it, pinned batches pile up, and a NaN is seen hundreds of steps late."""
    log = runlog.Log(tmp_path / "metrics.jsonl", 0, Hyper(steps=99), 1, Console(file=io.StringIO()))
    events = [Later() for _ in range(runlog.AHEAD + 3)]
    for step, event in enumerate(events, 1):
        log.pending.append((step, ["seg"], torch.tensor([1.0]), event))
        log.read()
    assert [event.there for event in events] == [True] * 3 + [False] * runlog.AHEAD
    assert len(log.pending) == runlog.AHEAD and len(metrics(tmp_path)) == 3


@pytest.mark.parametrize("term", ("adv", "d", "d_grad"))
def test_train_a_nan_of_the_adversarial_part_is_named_too(few, tmp_path, monkeypatch, term):
    if term == "d_grad":
        norm, calls = train.gradient_norm, []

        def gradient_norm(optimizer):
            calls.append(1)
            return norm(optimizer) * (math.nan if isinstance(optimizer, torch.optim.Adam) else 1)

        monkeypatch.setattr(train, "gradient_norm", gradient_norm)
    else:
        loss, wanted = clan.adversarial_loss, {"adv": 0, "d": 1}[term]

        def adversarial_loss(d_logits, is_source, weight=None):
            by_d = d_logits.requires_grad and not is_source  # G's own loss asks for "source"
            return loss(d_logits, is_source, weight) * (math.nan if by_d == wanted else 1)

        monkeypatch.setattr(clan, "adversarial_loss", adversarial_loss)
    assert f"{term} is not finite at step 5: " in run_error(*SMALL, "--out", str(tmp_path))


def test_train_a_crash_in_the_middle_of_a_checkpoint_loses_nothing(few, tmp_path, monkeypatch):
    whole, parts = run(tmp_path / "whole"), tmp_path / "parts"
    replaced = Path.replace

    def crash(path, target):
        if Path(target).name == "step_0000008.safetensors":
            raise KeyboardInterrupt
        return replaced(path, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "replace", crash)
        run(parts)
    assert (parts / "step_0000008.tmp").exists()
    train.main(["--resume", str(parts)])
    assert_equal(last_tensors(parts), last_tensors(whole))
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert not list(parts.glob("*.tmp"))


def test_train_a_run_killed_before_its_first_step_file_goes_on_from_adaptations_start(
    few, tmp_path
):
    flags = ("--save-every", "100", "--eval-every", "2")
    whole, cut = run(tmp_path / "whole", *flags), run(tmp_path / "cut", *flags)
    for path in cut.glob("step_*"):
        path.unlink()
    train.main(["--resume", str(cut)])
    assert_equal(last_tensors(cut), last_tensors(whole))
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("how", ("missing", "extra", "reshaped", "optimizer", "metadata"))
def test_train_a_checkpoint_that_does_not_fit_is_refused(finished, tmp_path, how):
    """Whole, by its checksum, and yet not of this network or this version."""
    tensors, text = checkpoints.read_checkpoint(finished / "step_0000008.safetensors")
    about = {k: json.loads(v) for k, v in text.items() if k != "format"}
    first = min(tensors)
    if how == "missing":
        del tensors[first]
    elif how == "extra":
        tensors["G.more"] = torch.zeros(1)
    elif how == "reshaped":
        tensors[first] = tensors[first][None]
    elif how == "optimizer":
        tensors["opt_g.999.momentum_buffer"] = torch.zeros(1)
    else:
        del about["settings"]["momentum"]
    path = tmp_path / "step_0000008.safetensors"
    checkpoints.save(path, tensors, about)
    before = path.read_bytes()
    error = run_error("--resume", str(path))
    assert path.name in error and REMEDY.search(error)
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("workers", (1, 4))
def test_train_killed_at_random_moments_a_run_ends_with_the_same_bytes(tmp_path, workers):
    """kill -9, SIGTERM and Ctrl-C in turns; now and then the newest checkpoint loses its end."""
    flags = "--src-size 32 64 --tgt-size 32 64 --steps 300 --adv-start 150 --batch 1 --device cpu"
    flags = f"{flags} --log-every 5 --save-every 10 --d-channels 4 --workers {workers}".split()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli(*flags, "--out", str(whole), stdout=subprocess.DEVNULL).wait(300) == 0
    rng, kills = np.random.default_rng(workers), 10
    numbers = itertools.cycle((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    for number in itertools.islice(numbers, kills):
        resume = ["--resume"] if list(parts.glob("step_*.safetensors")) else []
        process = cli(*flags, *resume, "--out", str(parts), stdout=subprocess.DEVNULL)
        time.sleep(2 + 3 * rng.random())  # half of it is the start of Python and the workers
        process.send_signal(number)
        assert process.wait(60) in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 0, 130)
        saved = sorted(parts.glob("step_*.safetensors"))
        if number == signal.SIGKILL and len(saved) > 1 and rng.random() < 0.7:
            spoil(saved[-1], "half")
    resume = ["--resume"] if list(parts.glob("step_*.safetensors")) else []
    process = cli(*flags, *resume, "--out", str(parts))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    last = "step_0000300.safetensors"
    assert_equal(load_file(parts / last), load_file(whole / last))
    for name in ("metrics.jsonl", checkpoints.BEFORE):
        if name == "metrics.jsonl":
            assert (parts / name).read_bytes() == (whole / name).read_bytes()
        else:
            assert_equal(load_file(parts / name), load_file(whole / name))


@pytest.mark.parametrize("program", ("train.py", "eval.py", "study.py", "bench.py"))
def test_a_ctrl_c_during_the_imports_ends_the_program(tmp_path, program):
    """Also where a library would swallow it, as torch does in places; C++ code aborts on it."""
    deaf = "try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    (tmp_path / "torch.py").write_text(f"import os, signal\n{deaf}")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(HERE / program)]
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(command, **options)
    assert done.returncode == -signal.SIGINT, done.stderr
    ignored = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]  # as a job with & in a script has it
    done = subprocess.run([*ignored, *command], **options)
    assert done.returncode == 1 and "Error" in done.stderr, "it went on"


# Many processes.


@pytest.mark.slow
def test_train_two_processes_take_the_step_of_one_with_twice_the_batch(tmp_path):
    """Same weights and score but for the order of sums: BatchNorm uses its running statistics."""
    flags = "--src-size 32 64 --tgt-size 32 64 --steps 6 --adv-start 3 --d-channels 4 --device cpu"
    flags = f"{flags} --batchnorm running --no-bn-affine --log-every 1 --lr-g 0.001".split()
    one, two = tmp_path / "one", tmp_path / "two"
    process = torchrun(*flags, "--batch", "1", "--out", str(two))
    train.main([*flags, "--batch", "2", "--out", str(one)])
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    a, b = last_tensors(one), last_tensors(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=name)
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        for term in {"grad", "d_grad", "cos"} & ours.keys():  # the others are rank 0's own
            assert ours[term] == pytest.approx(theirs[term], rel=1e-3)
    scores = [json.loads((out / "eval.json").read_text()) for out in (one, two)]
    assert scores[0]["miou"] == pytest.approx(scores[1]["miou"], abs=0.02)
    assert scores[0]["images"] == scores[1]["images"] == 250
    assert output.count("│ mIoU") == 1  # rank 0 alone speaks


@pytest.mark.slow
def test_train_two_processes_score_the_weights_that_they_save(tmp_path):
    """Each has running statistics of its own until they are made those of rank 0."""
    flags = "--src-size 32 64 --tgt-size 32 64 --steps 40 --adv-start 20 --d-channels 4 --batch 1"
    flags = f"{flags} --device cpu --batchnorm batch --out".split()
    process = torchrun(*flags, str(tmp_path))
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    scores = json.loads((tmp_path / "eval.json").read_text())["iou"]
    evaluation.main([str(tmp_path), "--device", "cpu"])
    assert json.loads((tmp_path / "eval.json").read_text())["iou"] == scores


def test_train_a_restart_goes_on_from_what_was_saved_or_given(finished, tmp_path, monkeypatch):
    file = finished / "step_0000004.safetensors"
    given = {"out": tmp_path / "new"}
    for resume in (None, file, finished):
        assert restarted(given, resume) is resume  # a first start
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted({}, file) == finished and restarted({}, finished) == finished
    for resume in (None, file):  # nothing is in the new folder yet
        assert restarted(given, resume) is resume
    shutil.copytree(finished, tmp_path / "new")
    for resume in (None, file):
        assert restarted(given, resume) == tmp_path / "new"


@pytest.mark.slow
def test_train_a_killed_rank_ends_the_job_or_is_brought_back_to_the_same_weights(tmp_path):
    flags = "--src-size 32 64 --tgt-size 32 64 --steps 300 --adv-start 150 --d-channels 4 --batch 1"
    flags = f"{flags} --device cpu --save-every 10 --log-every 5".split()
    outs = {name: tmp_path / name for name in ("whole", "killed", "restarted")}
    assert torchrun(*flags, "--out", str(outs["whole"]), stdout=subprocess.DEVNULL).wait(300) == 0
    for name, restarts in (("killed", 0), ("restarted", 2)):
        process = torchrun(*flags, "--out", str(outs[name]), restarts=restarts)
        while not list(outs[name].glob("step_*.safetensors")):
            time.sleep(0.05)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        output = process.communicate(timeout=300)[0]
        if restarts:
            assert process.returncode == 0, output
            assert output.count("going on from") == 1 and "failed (exitcode: -9)" in output
            assert_equal(last_tensors(outs[name]), last_tensors(outs["whole"]))
        else:
            assert process.returncode != 0 and "Traceback" not in output.split("torch/")[0]
            assert len(re.findall(r"^error: ", output, re.MULTILINE)) <= 1
            assert "Signal 9 (SIGKILL)" in output
            assert "made by 2 processes" in run_error("--resume", str(outs[name]))


# What grows, and what must not be reached.


@pytest.mark.slow
def test_train_a_long_run_keeps_its_memory_and_its_files(tmp_path):
    """2,000 steps with ten evaluations: memory and open files flat, the log in proportion."""
    script = f"""
import json, os, sys
sys.path.insert(0, {str(HERE)!r})
import torch, train, measure, data
torch.set_num_threads(1)
data.STREETS = {{key: (first, 100) for key, (first, _) in data.STREETS.items()}}  # soon all cached
seen = []
score = train.evaluation.score
def watched(*arguments, **options):
    result = score(*arguments, **options)
    seen.append((measure.resident("VmRSS"), len(os.listdir("/proc/self/fd"))))
    return result
train.evaluation.score = watched
train.main(sys.argv[1:])
print("SEEN", json.dumps(seen))
"""
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    flags = "--src-size 32 64 --tgt-size 32 64 --steps 2000 --adv-start 20 --batch 1 --device cpu"
    flags = f"{flags} --d-channels 4 --eval-every 200 --save-every 100 --log-every 10".split()
    command = [sys.executable, "-c", script, *flags, "--out", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=500).stdout
    seen = json.loads(output.split("SEEN ")[1])
    memory, files = np.array(seen[3:10], dtype=float).T
    slope = np.median(np.diff(memory)) / 200  # the allocator takes a block now and then
    total = memory[-1] / memory[0]
    print(f"resident memory grows by {slope:.0f} bytes a step, {files[0]:.0f} open files")
    assert slope < 1_000 and total < 1.02 and files.max() == files.min()
    assert len(metrics(tmp_path)) == 200 + 1 + 9


def test_train_and_eval_work_without_a_network(few, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

    def refused(*arguments, **options):
        raise AssertionError("a socket was opened")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    out = run(tmp_path / "run")
    evaluation.main([str(out), "--device", "cpu"])
    images = tmp_path / "photos"
    images.mkdir()
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(images / "a.png")
    evaluation.main(["predict", str(out), "--images", str(images), "--out", str(tmp_path / "m")])
    with pytest.raises(AssertionError, match="socket"):  # the one thing that needs it
        load_weights(models.Generator("r101", lineage="torchvision"), "imagenet")


@pytest.mark.parametrize(
    ("flags", "remedy"),
    (
        ("step", "Give smaller --sizes, a smaller --batch, --amp or --recompute."),
        ("step --amp --batch 1 --recompute", "Give smaller --sizes."),
        ("step --backbone vgg16", "Give smaller --sizes or --amp."),
        ("step --method clan", "Give smaller --sizes, a smaller --batch or --amp."),
        ("growth --backbone r101", "Give smaller --sizes or --amp."),
        ("loader", "Give fewer --workers."),
        ("loader --workers 0", "No flag lowers it: use a machine with more memory."),
        ("eval", "No flag lowers it: use a machine with more memory."),
    ),
)
def test_bench_out_of_memory_names_flags_of_the_command(flags, remedy, monkeypatch):
    """MemoryError has no words of its own."""

    def full(*arguments):
        raise MemoryError

    monkeypatch.setitem(bench.COMMANDS, flags.split()[0], full)
    with pytest.raises(SystemExit) as caught:
        bench.main(flags.split())
    assert caught.value.code == f"error: no memory. {remedy}"
