"""The command line: its flags, and what is wrong with it, said before jax is loaded."""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from beitv2_jax.config.load import config_file, flatten, load
from beitv2_jax.config.paths import refuse_remote
from beitv2_jax.errors import UserError, nearest

DEFAULT_CACHE = "~/.cache/beitv2_jax/xla"
FLAG_NAMES = (
    "config",
    "workdir",
    "task",
    "allow_config_change",
    "plan",
    "plan_examples",
    "plan_compile",
    "plan_minutes",
    "distributed",
    "compilation_cache",
    "print_config",
)
USAGE = """\
python -m beitv2_jax.main --config=FILE[:PRESET,PRESET...] --workdir=DIR [--config.KEY=VALUE ...] [FLAGS]

The files in configs/ are the stages; each lists its presets and keys. --flagfile=FILE reads flags from a file.
"""
TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "numbers in brackets, inside quotes",
}


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define this program's flags in `values`; `argv` shows which config keys will be overridden."""
    config_flags.DEFINE_config_file(
        "config", None, "Config file and its presets, such as configs/mim.py:large,300ep.", values, sys_argv=list(argv)
    )
    flags.DEFINE_string("workdir", None, "Directory of the run; a run found there is continued.", values)
    flags.DEFINE_enum(
        "task",
        "run",
        ["run", "verify"],
        "'verify' computes a random sample of a finished target cache (extract, tokenize) again and compares.",
        values,
    )
    flags.DEFINE_boolean(
        "allow_config_change",
        False,
        "Resume the unfinished run in --workdir although its data or settings, and with them its result, changed.",
        values,
    )
    flags.DEFINE_string(
        "plan",
        None,
        "Train nothing; predict what the run needs on other chips: v5e:16x16, v5p:64, h100:8, or auto:v5e.",
        values,
    )
    flags.DEFINE_integer(
        "plan_examples",
        0,
        "Number of training images, for --plan, of a data set that it does not know.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "plan_compile",
        True,
        "Compile the step for --plan; otherwise everything is estimated from the traced step.",
        values,
    )
    flags.DEFINE_float(
        "plan_minutes", 10.0, "Minutes after which --plan=auto starts no further compilation.", flag_values=values
    )
    flags.DEFINE_boolean(
        "distributed",
        None,
        "Connect to the other processes of the run. By default only under SLURM, Open MPI and TPU slices on GKE.",
        values,
    )
    flags.DEFINE_string(
        "compilation_cache",
        os.environ.get("JAX_COMPILATION_CACHE_DIR", DEFAULT_CACHE),
        "Directory in which compiled programs are cached between runs; '' for none.",
        values,
    )
    flags.DEFINE_boolean("print_config", False, "Run nothing; print the config with all overrides as JSON.", values)


def parse_flags(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Define and parse the flags in `argv` and return what is left of it; with --help, print them and exit with 0.

    Raises:
        UserError: config file, preset or key unknown, value of a wrong type, or a flag missing or unknown.
    """
    try:
        argv = [argv[0], *values.read_flags_from_files(argv[1:])]  # --flagfile
    except flags.Error as error:
        raise UserError(
            f"{str(error).rstrip('.')}.",
            "Did you mistype the path of the file?",
            "Write --flagfile=PATH of a text file with one flag in each line.",
        ) from error
    argv = _last_overrides(argv)
    argv = _with_installed_config(argv)
    define_flags(values, argv)
    if any(re.fullmatch(r"-h|--?help\w*", arg) for arg in argv):
        print(USAGE + values.module_help(__name__))
        sys.exit(0)
    defaults = _check_config(argv)
    try:
        rest = values(list(argv))
    except (flags.Error, TypeError) as error:
        raise _explain(error, argv, defaults) from error
    if len(rest) > 1:
        raise UserError(
            f"The argument '{rest[1]}' is not expected.",
            "Did you forget the quotes around a value with spaces, as in --config.run.duration='300 epochs'?",
            "Write every argument as --NAME=VALUE, with the value in quotes if it has spaces.",
        )
    for name in ("workdir", "compilation_cache"):
        refuse_remote(f"--{name}", values[name].value or "", buckets=True)
    if not values.workdir and not values.plan and not values.print_config:
        raise UserError(
            "The flag --workdir is missing.",
            "It names the directory in which the run is written.",
            "Write --workdir=runs/NAME.",
        )
    return rest


def _with_installed_config(argv: Sequence[str]) -> list[str]:
    """Return `argv` with --config=configs/NAME.py replaced by the installed file where there is none in this folder."""
    found = list(argv)
    for place, arg in enumerate(argv):
        if match := re.fullmatch(r"(--?config=)(.+)", arg):
            start, spec = match.groups()
        elif place and re.fullmatch(r"--?config", argv[place - 1]):
            start, spec = "", arg
        else:
            continue
        name, colon, presets = spec.partition(":")
        found[place] = f"{start}{config_file(Path(name))}{colon}{presets}"
    return found


def _overridden(arg: str) -> str | None:
    """Return the config key that an argument overrides ('--config.seed=1' -> 'seed'), None for other arguments."""
    match = re.match(r"--?(?:no)?config\.([^=]+)", arg)
    return match[1] if match else None


def _last_overrides(argv: Sequence[str]) -> list[str]:
    """Return `argv` without overrides of config keys that are overridden again, since tuples would be joined."""
    overrides: list[tuple[str | None, list[str]]] = []
    for arg in argv:
        if overrides and overrides[-1][0] and "=" not in overrides[-1][1][0] and not arg.startswith("-"):
            overrides[-1][1].append(arg)  # the value of the key before it
        else:
            overrides.append((_overridden(arg), [arg]))
    last = {key: number for number, (key, _) in enumerate(overrides)}
    return [arg for number, (key, args) in enumerate(overrides) if key is None or last[key] == number for arg in args]


def _check_config(argv: Sequence[str]) -> dict[str, object]:
    """Return {key: default} of the config in `argv`, after checking what the config flags report late or not at all.

    Raises:
        UserError: no config file, no such file or preset, no such key, or a key given before the file.
    """
    spec = None
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        if match := re.fullmatch(r"--?config(?:=(.*))?", arg):
            spec = following if match[1] is None else match[1]
        elif spec is None and _overridden(arg):
            raise UserError(
                f"The flag {arg} comes before --config.",
                "Config keys can be set only after the file that defines them.",
                f"Write --config=FILE {shlex.quote(arg)}.",
            )
    if not spec:
        raise UserError(
            "The flag --config is missing.",
            "It names the config file of the stage to run.",
            "Write --config=configs/quickstart.py, for example.",
        )
    refuse_remote("--config", spec)
    name, colon, presets = spec.partition(":")
    if Path(name).suffix != ".py":
        file = f"configs/{Path(name).stem}.py"
        load(file)  # if it is not there, what is there is listed
        raise UserError(
            f"--config={spec} is not a Python file.",
            f"Did you mean the file {file}?",
            f"Write --config={file}{colon}{presets}.",
        )
    defaults = flatten(load(spec))
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        key = _overridden(arg)
        if key and key not in defaults:
            raise _unknown_key(key, _given_value(arg, following), defaults)
    return defaults


def _given_value(arg: str, following: str) -> str:
    """Return the value that `arg` gives a config key, or the argument `following` it."""
    _, equals, value = arg.partition("=")
    if equals:
        return value
    return following if following and not following.startswith("-") else str(not re.match("--?no", arg))


def _likely_key(key: str, names: Sequence[str]) -> str | None:
    """Return the key among `names` whose last part is close to that of `key`: a section in common is no likeness."""
    last_parts = {name.split(".")[-1] for name in names}
    last = nearest(key.split(".")[-1], last_parts)
    return nearest(key, [name for name in names if name.split(".")[-1] == last], least=0)


def _unknown_key(key: str, value: str, defaults: Mapping[str, object]) -> UserError:
    """Return the error for an unknown config key; a section's own keys and keys of the same last name come first."""
    section, _, last = key.rpartition(".")
    inside = [name for name in defaults if name.startswith(key + ".")]
    namesakes = [name for name in defaults if name.split(".")[-1] == last]
    siblings = [name for name in defaults if section and name.startswith(section + ".")]
    guess = nearest(key, inside or namesakes, least=0) or _likely_key(key, siblings) or _likely_key(key, [*defaults])
    happened = f"The config section '{key}' has no value of its own." if inside else f"The config has no key '{key}'."
    if guess:
        value = shlex.quote(str(defaults[guess]) if inside else value)
        return UserError(
            happened, f"Did you mean '{guess}', whose value is {defaults[guess]!r}?", f"Write --config.{guess}={value}."
        )
    parts = sorted({name.removeprefix(f"{section}.").partition(".")[0] for name in siblings or defaults})
    return UserError(
        happened,
        "Did you mean a key of the config of another stage?",
        f"Write a key of {f'the section {section}' if siblings else 'the config'}, which has {', '.join(parts)}.",
    )


def _explain(error: Exception, argv: Sequence[str], defaults: Mapping[str, object]) -> UserError:
    """Return the three-part form of what absl or the config flags say about `argv`."""
    if isinstance(error, flags.UnrecognizedFlagError):
        guess = nearest(error.flagname, FLAG_NAMES)
        return UserError(
            f"There is no flag --{error.flagname}.",
            f"Did you mean --{guess}?" if guess else "Did you mean a key of the config, --config.KEY=VALUE?",
            f"Write --{guess}=VALUE, or see --help." if guess else f"Write one of --{', --'.join(FLAG_NAMES)}.",
        )
    for key in filter(None, map(_overridden, argv)):
        if f"config.{key}" in str(error):
            kind = TYPE_NAMES.get(type(defaults[key]), "a value of another type")
            return UserError(
                f"{str(error).rstrip('.')}.",
                f"Did you mean {kind}, such as the default {defaults[key]!r}?",
                f"Write --config.{key}={shlex.quote(str(defaults[key]))}, for example.",
            )
    return UserError(
        f"{str(error).rstrip('.')}.", "Did you mean a value of another type?", "See --help for what each flag takes."
    )
