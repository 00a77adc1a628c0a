"""Does a change of structure change a bit? Runs another commit and this tree, and compares them.

    python tests/same_bits.py 5fad239                 # every run, about 20 minutes on two cores
    python tests/same_bits.py HEAD --only clan lite0  # some of them
    python tests/same_bits.py HEAD --only bench       # operations and time of a step

For each run the last checkpoint and that of adv_start must hold the same tensors (name, type,
shape and bytes of G, D and both optimizers), metrics.jsonl the same text, and eval.json the same
scores. Metadata may differ. Each run has one thread. The other commit is checked out beside this
tree and removed at the end. Ends with 1 if anything differs.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from checkpoints import BEFORE, checksum, newest_checkpoint, read_checkpoint  # noqa: E402

SHORT = "--steps 60 --adv-start 30 --seed 3 --log-every 1"
FULL = "--init none --steps 2 --src streets --tgt streets --src-size 64 128 --tgt-size 64 128"
RUNS = {
    "source": f"{SHORT} --method source",
    "tan": f"{SHORT} --method tan",
    "clan": SHORT,
    "released": f"{SHORT} --recipe released",
    "shuffled": f"{SHORT} --m-control shuffled",
    "minimax": f"{SHORT} --minimax",
    "bf16": f"{SHORT} --amp bf16",
    "killed": f"{SHORT} --save-every 15",
    "lite0": "--backbone lite0 --src streets --tgt streets --steps 6 --adv-start 3 --log-every 1",
    "r101": f"--backbone r101 {FULL} --log-every 1",
    "vgg16": f"--backbone vgg16 {FULL} --log-every 1",
    "processes": f"{SHORT} --batch 2",
}
KILLED_AFTER = "step_0000045.safetensors"
# Flags and log terms that had another name in older commits: the new one, the old one.
OLD_FLAGS = {"--m-control": "--weight-map"}
OLD_TERMS = {'"cos"': '"weight"'}


def command(name: str, flags: list[str], out: Path) -> list[str]:
    launcher = [sys.executable]
    if name == "processes":
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "train.py", *flags, "--device", "cpu", "--out", str(out)]


def run(tree: Path, name: str, out: Path) -> None:
    """One run of a tree; "killed" is stopped by kill -9 after step 45 and goes on."""
    flags = RUNS[name].split()
    if "weight_map" in (tree / "clan.py").read_text():
        flags = [OLD_FLAGS.get(flag, flag) for flag in flags]
    if name == "killed":
        process = start(tree, command(name, flags, out))
        while not (out / KILLED_AFTER).exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"{tree}: the run ended before it was killed")
        flags = ["--resume", *flags]
    process = start(tree, command(name, flags, out))
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name} of {tree} ended with {process.returncode}:\n{output}")


def start(tree: Path, line: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, cwd=tree, env=environment, **pipes)


def result(out: Path) -> dict:
    """What must be equal: checksums, the log's text, the scores."""
    paths = {"last": newest_checkpoint(out), "before": out / BEFORE}
    found = {k: checksum(read_checkpoint(p)[0], {}) for k, p in paths.items() if p.exists()}
    text = (out / "metrics.jsonl").read_text()
    for new, old in OLD_TERMS.items():
        text = text.replace(old, new)
    scores = json.loads((out / "eval.json").read_text())
    scores = {k: scores.get(k) for k in ("miou", "miou_before", "iou", "left_out", "images")}
    return found | {"metrics": text, "scores": scores}


def compare(name: str, trees: dict[str, Path], work: Path) -> bool:
    results = []
    for side, tree in trees.items():
        run(tree, name, work / side / name)
        results.append(result(work / side / name))
    return report(name, *results)


def report(name: str, before: dict, now: dict) -> bool:
    different = [k for k in before.keys() | now.keys() if before.get(k) != now.get(k)]
    print(f"{name:12} {'DIFFERS in ' + ', '.join(different) if different else 'same'}", end="")
    print(f"  {now['last'][:12]} {now.get('before', '')[:12]}", flush=True)
    return not different


def compare_study(trees: dict[str, Path], work: Path) -> bool:
    """`study.py table --quick --seeds 0`: every run that it makes."""
    for side, tree in trees.items():
        folder = str(work / side / "study")
        line = [sys.executable, "study.py", "table", "--quick", "--seeds", "0", "--runs", folder]
        process = start(tree, line)
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"study.py of {tree} ended with {process.returncode}:\n{output}")
    before, now = (work / side / "study" / "streets-streets-tiny" for side in trees)
    names = {path.name for folder in (before, now) for path in folder.iterdir()}
    same = [report(name, result(before / name), result(now / name)) for name in sorted(names)]
    return all(same)


def compare_bench(trees: dict[str, Path], rounds: int = 5) -> bool:
    """Operations of a step must be equal; its time, in turns, within 5 % by the median."""
    results: dict[str, list[dict]] = {side: [] for side in trees}
    for _ in range(rounds):
        for side, tree in trees.items():
            line = [sys.executable, "bench.py", "step", "--threads", "1", "--json"]
            output, _ = start(tree, line).communicate()
            results[side].append(json.loads(output.splitlines()[-1]))
    times = {k: statistics.median(r["step_s"] for r in v) for k, v in results.items()}
    before, now = times.values()
    same = len({json.dumps(r["gflop"]) for v in results.values() for r in v}) == 1
    counted, ratio = "same" if same else "DIFFERS", now / before
    print(f"bench        gflop {counted}, step {before:.4f} s and {now:.4f} s, ratio {ratio:.3f}")
    return same and abs(ratio - 1) < 0.05


def main() -> None:
    choices = [*RUNS, "study", "bench"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rev", help="the commit to compare this tree with")
    parser.add_argument("--only", nargs="+", choices=choices, default=choices)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--detach", str(work / "rev"), args.rev], check=True)
        trees = {"before": work / "rev", "now": HERE}
        try:
            same = [compare(name, trees, work) for name in RUNS if name in args.only]
            if "study" in args.only:
                same.append(compare_study(trees, work))
            if "bench" in args.only:
                same.append(compare_bench(trees))
        finally:
            subprocess.run([*git, "remove", "--force", str(work / "rev")], check=True)
    sys.exit(0 if all(same) else 1)


if __name__ == "__main__":
    main()
