"""The command line: parse flags, start jax, run the stage.

python -m beitv2_jax.main --config=configs/vqkd.py:imagenette --workdir=runs/vqkd --config.optim.peak_lr=1e-3
"""

import signal
import traceback
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from beitv2_jax import config as config_lib
from beitv2_jax.config.flags import parse_flags
from beitv2_jax.errors import Resumable, UserError, print_error
from beitv2_jax.runtime import buckets, launch, open_files, startup_times


def run(argv: Sequence[str]) -> None:
    """Run the stage that the parsed flags describe."""
    del argv
    values = flags.FLAGS
    launch.start_logging(values["verbosity"].present)
    if values.print_config:
        from beitv2_jax.tasks.initial import completed

        workdir = _absolute(values.workdir or ".")
        print(config_lib.to_json(config_lib.resolve(completed(values.config, workdir, tolerant=True), workdir)))
        return
    if values.plan:
        launch.check_jax_settings()
        from beitv2_jax.planning.command import run_plan

        workdir = _absolute(values.workdir) if values.workdir else ""
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
    open_files.raise_limit()
    config_lib.validate(values.config)
    workdir = _absolute(values.workdir)
    startup_times.ended("flags")
    launch.start_jax(values.distributed, values.compilation_cache)
    # imported here: jax must be started first, and a wrong flag is reported before jax is loaded
    from beitv2_jax.runners import stages

    startup_times.ended("imports")
    config_file, _, _ = config_flags.get_config_filename(values["config"]).partition(":")
    defaults = config_lib.load(config_file)
    if values.task == "verify":
        stages.verify_stage(values.config, workdir, defaults=defaults)
    else:
        stages.run_stage(values.config, workdir, allow_config_change=values.allow_config_change, defaults=defaults)


def _absolute(workdir: str) -> str:
    return buckets.absolute(config_lib.expand_home(workdir))


def main() -> None:
    """Run the program; what the user can correct, and `Resumable`, ends without a traceback (exit codes 2, 75)."""
    launch.keep_running_without_log()
    try:
        app.run(run, flags_parser=parse_flags)
    except UserError as error:
        print_error(f"Error: {error}")
        launch.leave(2)
    except Resumable as ended:
        print_error(ended)
        launch.leave(Resumable.EXIT_CODE)
    except KeyboardInterrupt:
        # no stage was running, or none that had something to save
        print_error("Interrupted before there was anything to save; the same command starts again.")
        launch.leave(128 + signal.SIGINT)
    except Exception as error:
        if explained := launch.failed_write(error) or buckets.unusable(error):
            print_error(f"Error: {explained}")
            launch.leave(2)
        traceback.print_exc()
        launch.leave(1)


if __name__ == "__main__":
    main()
