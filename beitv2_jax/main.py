"""The command line: parse flags, start jax, hand over to the stage. No logic of its own.

python -m beitv2_jax.main --config=configs/vqkd.py:imagenette --workdir=runs/vqkd --config.optim.peak_lr=1e-3
"""

import os
import re
import shlex
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from logging import ERROR, WARNING, Formatter, LogRecord
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from beitv2_jax import config as config_lib
from beitv2_jax.errors import Preempted, UserError, nearest, print_error
from beitv2_jax.runtime import startup_times

DEFAULT_CACHE = "~/.cache/beitv2_jax/xla"
HEARTBEAT_SECONDS = 100
"""A process that jax has not heard of for so long is lost, and jax aborts the others (code 134). A process that hangs
still beats: `runtime.watchdog` notices that."""
FAREWELL_SECONDS = 10.0
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
)
SHORTENED_LENGTH = 200
TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "numbers in brackets, inside quotes,",
}


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define this program's flags in `values`; `argv` tells which config keys will be overridden."""
    config_flags.DEFINE_config_file(
        "config", None, "Config file and its presets, such as configs/mim.py:large,300ep.", values, sys_argv=list(argv)
    )
    flags.DEFINE_string("workdir", None, "Directory of the run; a run found there is continued.", values)
    flags.DEFINE_enum(
        "task",
        "run",
        ["run", "verify"],
        "'verify' compares a random sample of a finished store (extract, tokenize) with the network's live answer.",
        values,
    )
    flags.DEFINE_boolean(
        "allow_config_change",
        False,
        "Continue the run in --workdir although a key that changes its result has another value than before.",
        values,
    )
    flags.DEFINE_string(
        "plan",
        None,
        "Train nothing; plan the run for chips that are not here: v5e:16x16, v5p:64, h100:8, or auto:v5e.",
        values,
    )
    flags.DEFINE_integer(
        "plan_examples", 0, "Training images of a data set that --plan neither knows nor finds.", flag_values=values
    )
    flags.DEFINE_boolean("plan_compile", True, "Compile the step for --plan; without, all is arithmetic.", values)
    flags.DEFINE_float(
        "plan_minutes", 10.0, "After how long --plan=auto begins no further compilation.", flag_values=values
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
        "Directory of compiled programs, kept between runs; '' for none.",
        values,
    )


def parse_flags(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Define and parse the flags in `argv` and return what is left of it.

    Raises:
        UserError: config file, preset or key unknown, value of a wrong type, or a flag missing or unknown.
    """
    define_flags(values, argv)
    if any(re.fullmatch(r"--?help\w*", arg) for arg in argv):
        return values(list(argv))
    defaults = _check_config(argv)
    try:
        rest = values(list(argv))
    except (flags.Error, TypeError) as error:
        raise _explain(error, argv, defaults) from error
    if len(rest) > 1:
        raise UserError(f"Unexpected argument '{rest[1]}'.", "a flag without its dashes or '='.", f"--{rest[1]}=VALUE")
    if not values.workdir and not values.plan:
        raise UserError("There is no --workdir.", "the run's directory was left out.", "--workdir=runs/NAME")
    return rest


def _overridden(arg: str) -> str | None:
    """Return the config key that an argument overrides ('--config.seed=1' -> 'seed'), None for other arguments."""
    match = re.match(r"--?(?:no)?config\.([^=]+)", arg)
    return match[1] if match else None


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
            raise UserError(f"{arg} stands before --config.", "the file comes first.", f"--config=FILE {arg}")
    if not spec:
        raise UserError(
            "There is no --config.", "the stage's config file was left out.", "--config=configs/quickstart.py"
        )
    name, colon, presets = spec.partition(":")
    if Path(name).suffix != ".py":
        raise UserError(
            f"--config={spec} is not a Python file.",
            "the name of a stage stands where the path of its file belongs.",
            f"--config=configs/{Path(name).stem}.py{colon}{presets}",
        )
    defaults = config_lib.flatten(config_lib.load(spec))
    for key in filter(None, map(_overridden, argv)):
        if key not in defaults:
            raise _unknown_key(key, defaults)
    return defaults


def _unknown_key(key: str, defaults: Mapping[str, object]) -> UserError:
    """Return the error for an unknown config key; a section's own keys and keys of the same last name come first."""
    inside = [name for name in defaults if name.startswith(key + ".")]
    namesakes = [name for name in defaults if name.split(".")[-1] == key.split(".")[-1]]
    guess = nearest(key, inside or namesakes or defaults)
    return UserError(
        f"The config section '{key}' has no value of its own." if inside else f"The config has no key '{key}'.",
        f"Did you mean '{guess}', whose value is {defaults[guess]!r}?",
        f"Write --config.{guess}={shlex.quote(str(defaults[guess]))}.",
    )


def _explain(error: Exception, argv: Sequence[str], defaults: Mapping[str, object]) -> UserError:
    """Return the three-part form of what absl or the config flags say about `argv`."""
    if isinstance(error, flags.UnrecognizedFlagError):
        guess = nearest(error.flagname, FLAG_NAMES)
        return UserError(f"There is no flag --{error.flagname}.", f"--{guess} was meant.", f"--{guess}=VALUE")
    for key in filter(None, map(_overridden, argv)):
        if f"config.{key}" in str(error):
            kind = TYPE_NAMES.get(type(defaults[key]), "a value of another type")
            return UserError(
                str(error),
                f"{kind} was meant; the default is {defaults[key]!r}.",
                f"--config.{key}={shlex.quote(str(defaults[key]))}",
            )
    return UserError(str(error), "a value of another type was meant.", "see --help")


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Tell whether `environment` is that of one of several processes of one run (SLURM step, Open MPI, TPU slice, or
    told by a launcher in JAX_NUM_PROCESSES)."""
    return (
        int(environment.get("JAX_NUM_PROCESSES", 1)) > 1
        or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "," in environment.get("TPU_PROCESS_ADDRESSES", "")
    )


def told_place(environment: Mapping[str, str]) -> dict[str, int]:
    """Return what a launcher says of this process, {} if nothing: then jax asks the cluster that it runs in.

    JAX_NUM_PROCESSES and JAX_PROCESS_ID are read here; JAX_COORDINATOR_ADDRESS, which goes with them, jax reads itself.
    """
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    return {argument: int(environment[name]) for argument, name in names.items() if name in environment}


def _shortened(record: LogRecord) -> bool:
    """Cut what Orbax's threads say of a save that fails, each on many lines: the checkpointer tells it."""
    if record.levelno >= ERROR and ("/orbax/" in record.pathname or record.name == "asyncio"):
        record.msg, record.args, record.exc_info = record.getMessage()[:SHORTENED_LENGTH], (), None
    return True


def start_logging(verbosity_given: bool) -> None:
    """Show this package's own messages and the warnings of libraries, unless --verbosity asks for something else."""
    if verbosity_given:
        return
    package = str(Path(__file__).parent)
    handler = logging.get_absl_handler()
    handler.addFilter(_shortened)
    handler.addFilter(lambda record: record.levelno >= WARNING or record.pathname.startswith(package))
    handler.setFormatter(Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.set_verbosity(logging.INFO)


def start_jax(distributed: bool | None, compilation_cache: str) -> None:
    """Start jax: quiet, with its compilation cache, connected to the other processes of the run where there are any.

    Args:
        distributed: whether to connect; None decides by the environment.
        compilation_cache: directory, '' for none.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(compilation_cache))
    if in_cluster(os.environ) if distributed is None else distributed:
        jax.distributed.initialize(**told_place(os.environ), heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        logging.info(
            "process %d of %d, on %s; what jax calls the leader task or the coordination service is process 0",
            jax.process_index(),
            jax.process_count(),
            socket.gethostname(),
        )
    startup_times.watch_compiler()
    startup_times.ended("jax")
    jax.devices()
    startup_times.ended("devices")


def run(argv: Sequence[str]) -> None:
    """Run the stage that the parsed flags describe."""
    del argv
    values = flags.FLAGS
    start_logging(values["verbosity"].present)
    if values.plan:
        from beitv2_jax.planning.command import run_plan

        workdir = os.path.abspath(values.workdir) if values.workdir else ""
        run_plan(
            values.config,
            values.plan,
            workdir,
            num_examples=values.plan_examples,
            compile_it=values.plan_compile,
            minutes=values.plan_minutes,
        )
        return
    startup_times.begin(startup_times.process_start())
    config_lib.validate(values.config)
    startup_times.ended("flags")
    start_jax(values.distributed, values.compilation_cache)
    # imported here: jax must be started first, and a slip in a flag should show before the stack is loaded
    from beitv2_jax.runners import stages

    startup_times.ended("imports")
    workdir = os.path.abspath(values.workdir)
    if values.task == "verify":
        stages.verify_stage(values.config, workdir)
    else:
        stages.run_stage(values.config, workdir, allow_config_change=values.allow_config_change)


def leave(code: int) -> None:
    """End the process with `code`; one of several does so though the others, who may wait for it, say no farewell."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        from beitv2_jax.runtime import watchdog

        # where all end alike they meet here; without that, the end of process 0 would abort the others
        farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(FAREWELL_SECONDS)
        watchdog.end_at_once(code)
    sys.exit(code)


def main() -> None:
    """Run the program; UserError and Preempted are printed without a traceback, the exit codes are 2 and 75."""
    try:
        app.run(run, flags_parser=parse_flags)
    except UserError as error:
        print_error(f"Error: {error}")
        leave(2)
    except Preempted as preempted:
        print_error(preempted)
        leave(Preempted.EXIT_CODE)
    except Exception:
        traceback.print_exc()
        leave(1)


if __name__ == "__main__":
    main()
