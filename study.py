"""Studies: many runs into one table or figure (Tables 1 and 2, Figures 3 to 6, controls).

    python study.py table                                    # streets, 3 methods, 5 seeds
    python study.py table --src gta5 --backbone r101 --data data
    python study.py control --jobs 2                         # place or size of the weight?
    python study.py all --quick --jobs 2                     # most studies, reduced

The flags of train.py may follow and hold for all runs, except those that a study sets itself. A
finished run is not run again, and an interrupted one goes on (runs.py). Results (Markdown, JSON
with every seed's scores, PNG) are written to --to. Scores are those of the last checkpoint on the
target's validation split.
"""

import argparse
import re
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

# Imports may swallow Ctrl-C or abort on it. Until they are done it ends the program at once.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import clan
from control import (
    MAIN,
    SEEDS,
    SHARED,
    control,
    instrument,
)
from devices import does_not_fit
from figures import (
    ccd,
    figure5,
    params,
    tsne,
    weightmap,
)
from methods import METHODS, first_stage, own_fields
from runlog import Stopped
from runs import (
    INTERVALS,
    Study,
    difference,
    mean_and_deviation,
    miou,
    points_apart,
    read_by,
    run_groups,
    write,
)
from second import decline, fourier, reliable, second, signs, trials
from settings import Flags, add_run_flags, configure, flag_of, less_memory
from tables import COMPARED, table_1_and_2
from train import NOT_BEGUN
from trust import LABELLING, calibration, disagreement, labels, ranking
from tuning import AXES, TUNING_SEEDS, sweep, tune

# Photographs as the target.

PHOTOGRAPHS: dict[str, Flags] = MAIN | SHARED


def photographs(study: Study, rows: dict[str, Flags] = PHOTOGRAPHS) -> None:
    """What each part gains where the target is photographs: the methods, M's place, BatchNorm."""
    results = run_groups(study, {name: study.cells(**change) for name, change in rows.items()})
    source = results["source only"]
    table = []
    for name, group in results.items():
        gains = points_apart(group, source)
        above = f"{sum(x > 0 for x in gains)} of {len(gains)}"
        scores = (r.get("miou_before") for r in group), map(miou, group)
        table.append([name, *map(mean_and_deviation, scores), difference(group, source), above])
    header = ["variant", "before", "mIoU", "minus source only", "above it"]
    note = (
        "Target mIoU in % before adaptation and after it, last checkpoint, mean ± deviation; the "
        f"gain over source only, and on how many seeds there is one. {INTERVALS}"
    )
    write(study, f"photographs-{study.task}", header, table, note, results)


DAY, DUSK = ("0006R0", "0016E5"), ("0001TP",)


def dusk(study: Study) -> None:
    """Adaptation from CamVid's day to its dusk; --tgt-dir is the folder of CamVid.

    Source: the train frames 0006R0* and 0016E5*. Target: 0001TP* of the same split, every other
    frame without its label for adaptation, the rest for scoring.
    """
    camvid = study.flags.get("tgt_dir")
    if camvid is None:
        raise ValueError("name CamVid's folder with --tgt-dir")
    images = sorted((camvid / "images" / "train").iterdir())
    by_day, at_dusk = ([p for p in images if p.name.startswith(names)] for names in (DAY, DUSK))
    if not by_day or len(at_dusk) < 2:
        raise ValueError(f"{camvid}/images/train holds no 0006R0*, 0016E5* and 0001TP* of CamVid")
    parts = {
        ("day", "train"): by_day,
        ("dusk", "train"): at_dusk[::2],
        ("dusk", "val"): at_dusk[1::2],
    }
    root = study.runs / "camvid"
    for (name, split), files in parts.items():
        link(camvid / "classes.json", root / name / "classes.json")
        for image in files:
            label = Path("labels") / "train" / f"{image.stem}.png"
            link(image, root / name / "images" / split / image.name)
            link(camvid / label, root / name / "labels" / split / label.name)
    folders = {"src": "folder", "src_dir": root / "day", "tgt": "folder", "tgt_dir": root / "dusk"}
    rows = {name: change for name, change in PHOTOGRAPHS.items() if name != "M shuffled"}
    photographs(replace(study, flags=study.flags | folders), rows)


def link(to: Path, path: Path) -> None:
    """Makes a symbolic link at `path`, or replaces one that points elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() and path.readlink() != to.resolve():
        path.unlink()
    if not path.is_symlink():
        path.symlink_to(to.resolve())


# The program.

# Flags of this program that every study reads.
FOR_ALL = {"seeds", "quick", "jobs", "runs", "to", "results"}


class Command(NamedTuple):
    """A row of COMMANDS."""

    make: Callable[[Study], None]
    reads: set[str]  # further flags of this program
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # unless --seeds says others
    images: int = 1000  # unless --images says others
    stage: tuple[str, ...] = ()  # its method besides those of --methods
    sets: tuple[str, ...] = ()  # flags of train.py that it sets for some of its runs


SECOND = ("selftrain",)
COMMANDS = {
    "table": Command(table_1_and_2, {"methods"}),
    "ccd": Command(ccd, {"methods", "images", "curve_class"}),
    "params": Command(params, set(), (0, 1, 2)),
    "tsne": Command(tsne, {"methods", "images"}, images=100),
    "figure5": Command(figure5, {"methods"}),
    "weightmap": Command(weightmap, set()),
    "disagreement": Command(disagreement, {"images"}, (0, 1), 100),
    "control": Command(control, set(), SEEDS),
    "instrument": Command(instrument, {"images"}, TUNING_SEEDS, 32),
    "sweep": Command(sweep, {"numbers"}, TUNING_SEEDS),
    "tune": Command(tune, {"methods", "numbers"}, TUNING_SEEDS[:2]),
    "labels": Command(labels, {"images"}, images=50, stage=LABELLING),
    "ranking": Command(ranking, set()),
    "calibration": Command(calibration, {"methods", "images"}, (0,)),
    "trials": Command(trials, {"images"}, TUNING_SEEDS[:2], 50, SECOND),
    "decline": Command(decline, {"images"}, TUNING_SEEDS[:2], 50, SECOND),
    "fourier": Command(fourier, set(), TUNING_SEEDS[:2], sets=("fourier",)),
    "signs": Command(signs, {"images"}, (0, 1, 2), 50, SECOND),
    "second": Command(second, {"images"}, images=50, stage=SECOND, sets=("fourier",)),
    "reliable": Command(reliable, {"images"}, (0,), 50, SECOND),
    "photographs": Command(photographs, set(), (0, 1, 2)),
    "dusk": Command(dusk, set(), (0, 1, 2)),
}
# For tuning, of other methods and runs, of photographs, or of a second stage.
NOT_IN_ALL: tuple[str, ...] = ("instrument", "sweep", "tune", "labels", "ranking")
NOT_IN_ALL += ("photographs", "dusk")
NOT_IN_ALL += ("trials", "decline", "fourier", "signs", "second", "reliable")
QUICK = {"steps": 90, "adv_start": 75, "eval_every": 10}  # flags of --quick
OPTIONS = FOR_ALL.union(*(command.reads for command in COMMANDS.values()))
SET_HERE = {"seed", "out", "method", "save_every", "keep"}  # flags of train.py that a study sets


def seeds_of(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"give whole numbers such as 0,1,2, not {text}")
    seeds = tuple(map(int, text.split(",")))
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"a seed is given twice in {text}")
    return seeds


def methods_of(text: str) -> tuple[str, ...]:
    known = first_stage()
    found = known if text == "all" else tuple(text.split(","))
    if not set(found) <= set(known) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"choose from {','.join(known)}, each once, or all")
    return found


def count_of(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    summaries = {k: (c.make.__doc__ or "").splitlines()[0] for k, c in COMMANDS.items()}
    listed = "\n".join(f"  {name:13}{summary}" for name, summary in summaries.items())
    top = argparse.ArgumentParser(
        description=f"{(__doc__ or '').splitlines()[0]}\n\n{listed}",
        epilog="The flags of train.py below hold for all runs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    top.add_argument("what", choices=[*COMMANDS, "all"], metavar="STUDY", help="one, or all")
    top.add_argument("--seeds", type=seeds_of, help="such as 0,1,2 [0 to 4, but for some studies]")
    top.add_argument("--quick", action="store_true", help="streets: short runs, a seed or two")
    top.add_argument("--jobs", type=count_of, help="runs at a time [1]")
    top.add_argument("--runs", type=Path, help="where runs go [runs/study]")
    top.add_argument("--to", type=Path, help="where results go [that of --runs]")
    top.add_argument("--results", type=Path, help="of recorded runs [results, or that of --runs]")
    top.add_argument(
        "--methods", type=methods_of, help=f"to compare, or all [{','.join(COMPARED)}]"
    )
    top.add_argument("--images", type=count_of, help="of each domain to measure on [by study]")
    top.add_argument("--class", dest="curve_class", help="whose curve ccd draws [wall]")
    top.add_argument("--numbers", type=count_of, help="how many searches, for sweep and tune [all]")
    add_run_flags(top, without=SET_HERE)
    return top


def parse(argv: list[str]) -> dict[str, Study]:
    """The studies to make, by name."""
    flags = vars(parser().parse_args(argv))
    flags = {k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()}
    what = flags.pop("what")
    asked = [name for name in COMMANDS if name not in NOT_IN_ALL] if what == "all" else [what]
    read = FOR_ALL.union(*(COMMANDS[name].reads for name in asked))
    unused = (OPTIONS & flags.keys()) - read
    if unused:
        raise ValueError(f"{what} does not use {', '.join(map(flag_of, sorted(unused)))}")
    for name in asked:
        if taken := flags.keys() & {*COMMANDS[name].sets}:
            raise ValueError(f"{name} sets {', '.join(map(flag_of, taken))} itself")
    methods = {*flags.get("methods", COMPARED)}.union(*(COMMANDS[name].stage for name in asked))
    for name in flags:
        having = {method for method in METHODS if name in own_fields(method)}
        if having and not having & methods:
            others = ", ".join(sorted(having))
            raise ValueError(f"{what} has no run that reads {flag_of(name)}, of {others}")
    of_study = {key: flags.pop(key) for key in OPTIONS & flags.keys()}
    if what == "dusk":
        flags = {"src": "folder", "tgt": "folder", "backbone": "lite0"} | flags
    seeds = {name: COMMANDS[name].seeds for name in asked}
    images = {name: COMMANDS[name].images for name in asked}
    runs = Path("runs") / "study"
    if of_study.pop("quick", False):
        if configure(read_by(clan.Hyper.method, flags))[0].backbone != "tiny":
            raise ValueError("--quick is for tiny on streets: give --steps and --seeds instead")
        flags, runs = QUICK | flags, Path("runs") / "study-quick"
        images = {name: min(count, 100) for name, count in images.items()}
        seeds = {name: (0, 1) if len(seeds[name]) == 5 else (0,) for name in asked}
    usual = runs == Path("runs") / "study" and "runs" not in of_study
    runs = of_study.pop("runs", runs)
    results = Path("results") if usual else runs / "results"  # trials of one's own go elsewhere
    defaults: Flags = {"methods": COMPARED, "jobs": 1, "curve_class": "wall", "numbers": len(AXES)}
    defaults |= {"to": runs, "results": results} | of_study
    command = shlex.join(["python", "study.py", *argv])
    found = {}
    for name in asked:
        of_name: Flags = {"seeds": seeds[name], "images": images[name]} | defaults
        found[name] = Study(flags=flags, runs=runs, command=command, **of_name)
    return found


def remedy_for(asked: list[Study]) -> str:
    """What lowers the memory of these studies, which have the same flags."""
    if not asked:
        return NOT_BEGUN
    jobs = asked[0].jobs
    remedy = less_memory(*asked[0].shared)
    return remedy + f" Or give fewer --jobs than {jobs}." * (jobs > 1)


def main(argv: list[str] | None = None) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    asked: dict[str, Study] = {}
    try:
        asked = parse(sys.argv[1:] if argv is None else argv)
        for name, study in asked.items():
            COMMANDS[name].make(study)
    except (Stopped, KeyboardInterrupt):
        print("stopped; run the same command to go on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        if does_not_fit(error):
            first = (str(error) or "no memory").splitlines()[0].rstrip(". ")
            sys.exit(f"error: {first}. {remedy_for([*asked.values()])}")
        if not isinstance(error, (ValueError, OSError, FloatingPointError)):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
