"""Processes for tests that need many: forks of one that has imported everything and started nothing of jax.

A fresh process costs seconds before it does anything. jax's threads do not survive a fork, so who forks must not have
used a device, or even asked for one.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import IO


def forked(function: Callable, *args, output: IO) -> int:
    """Call `function` in a fork of this process and return its id; what it prints goes to the open file `output`.

    The fork ends with 0, with 1 if there was an exception, or as `sys.exit` says.
    """
    sys.stdout.flush()
    if process := os.fork():
        return process
    code = 1
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        function(*args)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
