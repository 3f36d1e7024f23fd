"""The study of configs/study.py: run all of it in order, and make its tables and plots from the metrics of its runs.

    python -m benchmarks.study run --workdir=runs/study --teacher=vit_ti16_augreg_fp16.npz
    python -m benchmarks.study table --workdir=runs/study --out=docs/study

`run` starts one run after the other, each as a program of its own, and evaluates the codes of each tokenizer; given
again, it goes on where it stopped, also in the middle of a run. `--only=vqkd,pixels*` chooses runs by name, with what
they need. `table` takes whatever has finished. Both can work at the same time; two sweeps may share a workdir if their
`--only` name different runs.
"""

import argparse
import csv
import dataclasses
import fnmatch
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev

from beitv2_jax import config as config_lib
from beitv2_jax.training.writer import read_metrics

ROOT = Path(__file__).parents[1]
CONFIG = "configs/study.py"
SEEDS = ("", "seed1", "seed2")
ARMS = {
    "random": "random initialisation",
    "pixels": "MIM: normalised pixels",
    "pixel_codes": "MIM: k-means codes of raw patches",
    "cluster": "MIM: k-means codes of teacher features",
    "vqkd": "MIM: VQ-KD codes",
    "regress": "MIM: teacher features",
    "teacher": "the teacher itself",
}
FIRST = ("random", "vqkd", "pixels", "pixel_codes", "cluster", "regress", "teacher")
"""The arms in the order in which their results matter."""
EIGHT_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def seeds_of(arm: str) -> list[str]:
    """Return the names of the runs of an arm of the study, one for each seed."""
    return ["-".join(filter(None, (arm, seed))) for seed in SEEDS]


def arm_of(name: str) -> str:
    """Return the arm that a run is a seed of."""
    return "-".join(part for part in name.split("-") if part not in SEEDS)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim about the method, and the runs that test it, by name."""

    title: str
    runs: tuple[str, ...]

    @property
    def arms(self) -> list[str]:
        """The arms that the runs are seeds of, in their order."""
        return list(dict.fromkeys(map(arm_of, self.runs)))


CLAIMS = {
    3: Claim(
        "the patch-aggregation head improves the probes of [CLS]",
        (
            *("vqkd", *seeds_of("vqkd-no_head"), "vqkd-early3", "vqkd-early5"),
            *("vqkd-blocks2", "vqkd-blocks3", "vqkd-own_head"),
        ),
    ),
    4: Claim(
        "a low code dimension raises usage; the codebook fits the number of images",
        (
            *("vqkd-dim8", "vqkd", "vqkd-dim192"),
            *("vqkd-dim8-kmeans_once", "vqkd-kmeans_once", "vqkd-dim192-kmeans_once"),
            *(
                "-".join(filter(None, ("vqkd", images, codes)))
                for images in ("images1k", "", "images50k")
                for codes in ("", "codes2048", "codes8192")
            ),
        ),
    ),
    5: Claim("a deeper decoder helps", ("vqkd", "vqkd-decoder3")),
    6: Claim("a stronger teacher helps", ("vqkd", "vqkd-teacher_classifier", "vqkd-teacher_random")),
    7: Claim(
        "stored targets are as good as live ones",
        ("vqkd", "vqkd-views4", "vqkd-views10", "vqkd-live", "regress", "regress-features_float32"),
    ),
    8: Claim(
        "remedies against collapse",
        (
            *("vqkd", "vqkd-no_kmeans", *seeds_of("vqkd-kmeans_once"), "vqkd-rotation", "vqkd-fsq", "vqkd-simvq"),
            *("vqkd-low_rate", "vqkd-long-kmeans_once", "vqkd-long-revive"),
        ),
    ),
    9: Claim("bfloat16 and eight devices change nothing", ("vqkd", "vqkd-bfloat16", "vqkd-devices8")),
}
"""Claims 1 and 2 are those of the main comparison: the arms against each other, and over pre-training."""

COLUMNS = {
    "sgd": ("probe", "pretrained/cls_mean_normed/sgd", "linear, [CLS] and mean"),
    "logistic": ("probe", "pretrained/cls_normed/logistic", "linear, [CLS]"),
    "knn": ("probe", "pretrained/cls_normed/knn_20", "20-NN, [CLS]"),
    "finetune1": ("finetune1", "eval/accuracy", "1 % of the labels"),
    "finetune10": ("finetune10", "eval/accuracy", "10 %"),
    "finetune100": ("finetune100", "eval/accuracy", "100 %"),
}
"""Column -> stage, metric, title."""
CURVE = "pretrained/cls_mean_normed/sgd"
EVALUATION = "evaluation"
"""Folder of what `beitv2 evaluate` finds out about the codes of a tokenizer."""
EVALUATED = "test[:2000]"
"""Images whose patches are counted for it."""
CODES = {
    "usage": ("codebook_usage", "codes in use, %"),
    "perplexity": ("codebook_perplexity", "perplexity"),
    "loss": ("reconstruction_loss", "reconstruction loss"),
    "information": ("nmi_class", "mutual information with the class"),
}
"""Column -> metric of that evaluation, title."""
TRAINING = {
    "vqkd": {"reconstruction_loss": "reconstruction loss", "codebook_perplexity": "perplexity of the codes"},
    "mim": {"final_loss": "loss of the last layer", "final_accuracy": "accuracy on hidden patches"},
}
"""Stage whose training the plot of a claim shows -> metric -> title."""
Curves = dict[str, dict[str, list[tuple[float, ...]]]]
"""What a line is of -> run -> (step, values of one or more metrics), by steps; a line is the mean of its runs."""


# --- which runs there are


def presets_of(name: str) -> str:
    """Return the presets of the run of this name, which is also its folder: those that its name joins."""
    return ",".join(part for part in name.split("-") if part != "vqkd")


@functools.cache
def config_of(name: str):
    """Return the config of a run, with paths relative to a workdir '.'."""
    return config_lib.resolve(config_lib.load(f"{ROOT / CONFIG}:{presets_of(name)}"), ".")


def needed_by(name: str) -> list[str]:
    """Return the names of the runs whose folders a run reads."""
    paths = [value for value in config_lib.flatten(config_of(name)).values() if isinstance(value, str)]
    return list(dict.fromkeys(path.split("/")[1] for path in paths if path.startswith("../")))


def with_needed(names: Iterable[str]) -> list[str]:
    """Return the runs in order, each after those that it needs."""
    found: dict[str, None] = {}

    def add(name: str) -> None:
        for other in needed_by(name):
            add(other)
        found[name] = None

    for name in names:
        add(name)
    return list(found)


def evaluated_runs() -> list[str]:
    """Return the runs that are evaluated: the main comparison by seeds, then those of the other claims."""
    seeds = zip(*(seeds_of(arm) for arm in FIRST), strict=True)
    main = [name for names in seeds for name in names]
    main = [name for name in main if name not in seeds_of("teacher")[1:]]  # whose evaluation has nothing that is drawn
    return list(dict.fromkeys([*main, *(name for claim in CLAIMS.values() for name in claim.runs)]))


def all_runs() -> list[str]:
    """Return every run of the study, each after those that it needs."""
    return with_needed(evaluated_runs())


def chosen_runs(only: str) -> list[str]:
    """Return the runs whose names match one of the patterns in `only`, with what they need; all of them for ''."""
    patterns = only.split(",") if only else ["*"]
    known = all_runs()
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise SystemExit(f"No run is called {pattern}. There are {', '.join(known)}.")
    return with_needed([name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)])


# --- running them


def summary_of(workdir: Path, name: str, stage: str) -> dict | None:
    """Return the summary that a finished stage has left, or None."""
    path = workdir / name / stage / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else None


def tokenizer_of(name: str) -> str | None:
    """Return the stage of a run that makes a tokenizer, or None."""
    return next((stage for stage in config_of(name).stages if stage in ("vqkd", "cluster")), None)


def codes_of(workdir: Path, name: str) -> dict | None:
    """Return the metrics of the codes of the tokenizer of a run, or None if they have not been evaluated."""
    path = workdir / name / EVALUATION / "metrics.json"
    return json.loads(path.read_text())["metrics"] if path.is_file() else None


def missing_stages(workdir: Path, name: str) -> list[str]:
    """Return the stages of a run that have not finished, with `EVALUATION` as the last one of a tokenizer."""
    missing = [stage for stage in config_of(name).stages if summary_of(workdir, name, stage) is None]
    return [*missing, EVALUATION] if tokenizer_of(name) and codes_of(workdir, name) is None else missing


def seconds_left(workdir: Path, names: Sequence[str]) -> float | None:
    """Return how long the missing stages will take if each takes the mean of the finished ones of its name."""
    taken = defaultdict(list)
    for path in workdir.glob("*/*/summary.json"):
        taken[path.parent.name].append(json.loads(path.read_text())["seconds"])
    missing = [stage for name in names for stage in missing_stages(workdir, name)]
    if not taken:
        return None
    usual = mean(mean(seconds) for seconds in taken.values())
    return sum(mean(taken.get(stage, [usual])) for stage in missing)


def placed_teacher(workdir: Path, weights: str) -> Path:
    """Copy the teacher's weights into the workdir, with a file that says how its images are normalised; return it.

    ViT-Ti/16 of AugReg is normalised with mean and standard deviation 0.5, which its weights do not say.
    """
    target = workdir / "teacher_weights" / Path(weights).name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        statistics = {"mean": [0.5] * 3, "std": [0.5] * 3}
        (target.parent / "config.json").write_text(json.dumps({"pretrained_cfg": statistics}) + "\n")
        shutil.copyfile(weights, f"{target}.part")
        os.replace(f"{target}.part", target)
    return target


def run(workdir: Path, teacher: str, data_dir: str, only: str, threads: int) -> int:
    """Run what has not finished; return the exit status, 1 if a run has failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names, failed, started = chosen_runs(only), [], time.monotonic()
    weights = placed_teacher(workdir, teacher)
    for number, name in enumerate(names, 1):
        missing = missing_stages(workdir, name)
        if not missing:
            continue
        if blocking := [other for other in needed_by(name) if missing_stages(workdir, other)]:
            print(f"{name} is left out: it needs {', '.join(blocking)}", flush=True)
            failed.append(name)
            continue
        left = seconds_left(workdir, names[number - 1 :])
        rest = "" if left is None else f", about {left / 3600:.1f} h left"
        passed = (time.monotonic() - started) / 3600
        print(f"[{number} of {len(names)}] {name}: {', '.join(missing)} ({passed:.1f} h so far{rest})", flush=True)
        commands = [_training(workdir, name, weights, data_dir, threads)] if missing != [EVALUATION] else []
        commands += [_evaluation(workdir, name, data_dir)] if EVALUATION in missing else []
        if status := next(filter(None, (_start(workdir, name, command) for command in commands)), 0):
            failed.append(name)
            print(f"{name} ended with status {status}: {workdir / 'logs' / name}.log", flush=True)
    print(f"{len(names) - len(failed)} of {len(names)} runs have finished", flush=True)
    return 1 if failed else 0


def _training(workdir: Path, name: str, weights: Path, data_dir: str, threads: int) -> list[str]:
    """Return the command of a run."""
    presets = presets_of(name)
    return [
        *(sys.executable, "-m", "beitv2_jax.main", f"--config={CONFIG}{presets and ':' + presets}"),
        *(f"--workdir={workdir / name}", f"--config.teacher.weights={weights}", f"--config.data.data_dir={data_dir}"),
        *((f"--config.data.num_threads={threads}",) if threads else ()),
    ]


def _evaluation(workdir: Path, name: str, data_dir: str) -> list[str]:
    """Return the command that evaluates the codes of the tokenizer of a run."""
    return [
        *(sys.executable, "-m", "beitv2_jax.evaluate", str(workdir / name / tokenizer_of(name))),
        *(config_of(name).data.source, f"--split={EVALUATED}", f"--out={workdir / name / EVALUATION}"),
        *((f"--data_dir={data_dir}",) if data_dir else ()),
    ]


def _start(workdir: Path, name: str, command: Sequence[str]) -> int:
    """Run a command of a run and return its exit status; an interrupt is passed on and ends the sweep."""
    (workdir / "logs").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **(EIGHT_DEVICES if "devices8" in name else {})}
    with open(workdir / "logs" / f"{name}.log", "a") as log:
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise SystemExit(f"{name} was interrupted; the same command goes on with it.") from None


# --- tables and plots


def values_of(workdir: Path, name: str) -> dict[str, float]:
    """Return the figures of a run that are there: those of `COLUMNS`, and those of `CODES` of its tokenizer."""
    found = {}
    for column, (stage, metric, _) in COLUMNS.items():
        if (summary := summary_of(workdir, name, stage)) and metric in summary["metrics"]:
            found[column] = summary["metrics"][metric]
    for other in with_needed([name]):
        if metrics := codes_of(workdir, other):
            found |= {column: metrics[metric] for column, (metric, _) in CODES.items()}
    return found


def curve_of(workdir: Path, name: str) -> Iterator[tuple[int, float]]:
    """Yield (step, accuracy of the linear probe in %) of the probes during and after pre-training."""
    for stage in config_of(name).stages:
        if not (stage.startswith("probe") and stage != "probe"):
            continue
        if summary := summary_of(workdir, name, stage):
            trained = next(other for other in config_of(name).stages.values() if other.stage in ("mim", "regress"))
            step = stage.removeprefix("probe")
            end = trained.run.duration.split()[0]
            yield int(step if step.isdecimal() else end), 100 * summary["metrics"][CURVE]


def training_of(workdir: Path, name: str, stage: str) -> list[tuple[float, ...]]:
    """Return (step, metrics of `TRAINING`) as a run has logged them; nothing if it has no such stage."""
    keys = ("step", *TRAINING[stage])
    lines = read_metrics(workdir / name / stage)
    return [tuple(line[key] for key in keys) for line in lines if line.keys() >= set(keys)]


def compared_by(claim: Claim) -> tuple[str, dict[str, list[str]]]:
    """Return the stage whose training a claim is about, and (arm -> its runs with that stage, by name).

    That is vqkd if there are tokenizers of its own, and else mim, of all seeds.
    """
    tokenizers = {arm: [name for name in with_needed([arm]) if tokenizer_of(name) == "vqkd"] for arm in claim.arms}
    if all(names in ([], ["tokenizer"]) for names in tokenizers.values()):
        return "mim", {arm: seeds_of(arm) for arm in claim.arms}
    return "vqkd", tokenizers


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    shown = f"{100 * mean(values):.1f}"
    return f"{shown} ± {100 * stdev(values):.1f}" if len(values) > 1 else shown


def _measured(workdir: Path, arm: str) -> list[dict[str, float]]:
    """Return the figures of the seeds of an arm whose student has been evaluated."""
    found = [values_of(workdir, name) for name in seeds_of(arm)]
    return [values for values in found if values.keys() & COLUMNS.keys()]


def _spreads(found: Sequence[dict[str, float]], columns: Iterable[str]) -> list[str]:
    return [_spread([values[column] for values in found if column in values]) for column in columns]


def _code_cells(values: dict[str, float]) -> list[str]:
    """Return the figures of the tokenizer of a run, which all its seeds share, as cells of a table."""
    formats = {"usage": "{:.1%}", "perplexity": "{:.0f}", "loss": "{:.3f}", "information": "{:.3f}"}
    return [formats[column].format(values[column]).rstrip("%") if column in values else "" for column in CODES]


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(workdir: Path, out: Path) -> None:
    """Write `study.md`, `runs.csv`, and a CSV and a plot of each comparison, from the metrics of what has finished."""
    values_of_runs = {name: values for name in all_runs() if (values := values_of(workdir, name))}
    if not values_of_runs:
        raise SystemExit(
            f"No run in {workdir} has results. Did you mean the --workdir of `python -m benchmarks.study run`? "
            "`python -m benchmarks.study list --workdir=DIR` says which runs have finished."
        )
    out.mkdir(parents=True, exist_ok=True)
    main = {title: found for arm, title in ARMS.items() if (found := _measured(workdir, arm))}
    rows = [[title, str(len(found)), *_spreads(found, COLUMNS)] for title, found in main.items()]
    titles = [title for _, _, title in COLUMNS.values()]
    parts = ["## Main comparison", _markdown(["accuracy in %", "seeds", *titles], rows)]
    probes = ("sgd", "logistic", "knn")
    for number, claim in CLAIMS.items():
        rows = {}
        for arm in claim.arms:
            found, codes = _measured(workdir, arm), values_of(workdir, arm)
            if found or (codes and "tokenizer" not in with_needed([arm])):  # that one has a row already
                rows[arm] = [arm, *_code_cells(codes), str(len(found)), *_spreads(found, probes)]
        if not rows.keys() - ARMS.keys():  # nothing but what the main comparison has
            continue
        header = ["run", *(title for _, title in CODES.values()), "seeds", *(COLUMNS[column][2] for column in probes)]
        parts += [f"## Claim {number}: {claim.title}", _markdown(header, rows.values())]
        stage, runs_of = compared_by(claim)
        curves = {
            arm: {name: points for name in names if (points := training_of(workdir, name, stage))}
            for arm, names in runs_of.items()
        }
        _draw(out / f"claim{number}.png", TRAINING[stage], curves)
    (out / "study.md").write_text("\n\n".join(parts) + "\n")
    with open(out / "runs.csv", "w", newline="") as file:
        columns = (*COLUMNS, *CODES)
        writer = csv.writer(file)
        writer.writerow(("run", *columns))
        for name, values in values_of_runs.items():
            if values.keys() & COLUMNS.keys() or tokenizer_of(name):
                writer.writerow((name, *(f"{values[key]:.4f}" if key in values else "" for key in columns)))
    curves = {
        title: {name: points for name in seeds_of(arm) if (points := sorted(curve_of(workdir, name)))}
        for arm, title in ARMS.items()
    }
    _draw(out / "curve.png", {"linear probe": "linear probe, %"}, curves)
    print((out / "study.md").read_text())


def _draw(path: Path, metrics: dict[str, str], curves: Curves) -> None:
    """Draw one plot for each metric (name -> title), the mean and the range of the runs of a line; write a CSV too."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {label: runs for label, runs in curves.items() if runs}
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "step", *metrics))
        for name, points in ((name, points) for runs in curves.values() for name, points in runs.items()):
            writer.writerows((name, step, *(f"{value:.4f}" for value in values)) for step, *values in points)
    has_seeds = any(len(runs) > 1 for runs in curves.values())
    colors = plt.get_cmap("tab20" if len(curves) > 10 else "tab10")
    figure, all_axes = plt.subplots(1, len(metrics), figsize=(6 * len(metrics), 3.6), dpi=130, squeeze=False)
    for column, (axes, title) in enumerate(zip(all_axes[0], metrics.values(), strict=True), 1):
        for number, (label, runs) in enumerate(curves.items()):
            of_steps = defaultdict(list)
            for point in (point for points in runs.values() for point in points):
                of_steps[point[0]].append(point[column])
            steps, color = sorted(of_steps), colors(number)
            shown = f"{label} ({len(runs)} seed{'s' if len(runs) > 1 else ''})" if has_seeds else label
            axes.plot(steps, [mean(of_steps[step]) for step in steps], marker="o", ms=3, color=color, label=shown)
            lows, highs = ([choose(of_steps[step]) for step in steps] for choose in (min, max))
            axes.fill_between(steps, lows, highs, color=color, alpha=0.2, lw=0)
        axes.set(xlabel="steps", ylabel=title)
        if "perplexity" in title:  # from one code to thousands
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    if curves:
        all_axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Run, list or tabulate what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    sweep = verbs.add_parser("run", help="run what has not finished")
    sweep.add_argument("--teacher", required=True, metavar="FILE", help="weights of ViT-Ti/16 (AugReg)")
    sweep.add_argument("--data_dir", default="", help="TFDS directory of cifar10_6bit")
    sweep.add_argument("--only", default="", help="names or patterns of runs, with commas between them")
    sweep.add_argument("--threads", type=int, default=0, help="threads that prepare images; 0: as in the config")
    results = verbs.add_parser("table", help="make tables and plots")
    results.add_argument("--out", required=True, metavar="DIR")
    listed = verbs.add_parser("list", help="print the names of all runs, and whether they have finished")
    for verb in (sweep, results, listed):
        verb.add_argument("--workdir", required=True, metavar="DIR")
    options = parser.parse_args()
    workdir = Path(options.workdir).absolute()
    if options.verb == "table":
        table(workdir, Path(options.out))
    elif options.verb == "list":
        for name in all_runs():
            missing = missing_stages(workdir, name)
            print(f"{name:40} {'finished' if not missing else 'missing: ' + ', '.join(missing)}")
    else:
        if not Path(options.teacher).is_file():
            raise SystemExit(f"There is no file {options.teacher}. Write --teacher=FILE with the weights of ViT-Ti/16.")
        sys.exit(run(workdir, options.teacher, options.data_dir, options.only, options.threads))


if __name__ == "__main__":
    main()
