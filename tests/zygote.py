"""A process that has imported torch once and forks: each fork is a run of a script, up in milliseconds instead of seconds.

The forks are processes like any others: they have their own signals, limits, locks and open files, and can be killed.
A JSON request a line comes in by stdin, a line goes back for each: {"script": ..., "argv": ..., ...} -> its pid,
{"wait": pid} -> its exit code as subprocess would give it, null while it runs.
"""

import gc
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent


def preload() -> None:
    """Import all that the scripts import, also what torch imports late, and start no thread."""
    import torch
    import torch._dynamo  # with the first torch.optim.Adam

    torch.set_num_threads(1)
    import sample  # noqa: F401
    import train  # noqa: F401

    gc.freeze()  # the forks share all this: let no collection touch, and so copy, its pages


def start(script: str, argv: list[str], cwd: str, stdout: str, stderr: str, setup: str) -> int:
    """Fork a run of ROOT/script and return its pid. setup: Python code that the fork executes first."""
    if pid := os.fork():
        return pid
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, handle in ((os.devnull, 0), (stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), handle)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.chdir(cwd)
    sys.argv = [script, *argv]
    code = 1
    try:
        exec(setup, {})
        runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = 1 if isinstance(end.code, str) else end.code or 0
        print(end.code if isinstance(end.code, str) else "", end="", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            code = 120  # as the interpreter ends
    os._exit(code)


def wait(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def main() -> None:
    preload()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest
    for line in sys.stdin:
        request = json.loads(line)
        answer = wait(request["wait"]) if "wait" in request else start(**request)
        print(json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
