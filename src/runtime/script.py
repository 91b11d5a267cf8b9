"""What the three scripts have in common: how they end."""

import os
import sys
from collections.abc import Callable

from src.runtime.device import is_out_of_memory
from src.runtime.distributed import lost_contact
from src.runtime.signals import StopRequest
from src.utils import UserError


def run_script(name: str, body: Callable[[StopRequest], None], out_of_memory: Callable[[], str], stopped: str) -> int:
    """Run the body of a script to its exit code: 0, 2 for flags, 1 for what else the user can mend, 128 + the signal.

    What the user can mend is one sentence on stderr; a traceback is for our own mistakes.
    out_of_memory: what to do then.   stopped: what stands after a signal that ended the body at once.
    """
    with StopRequest() as stop:
        try:
            body(stop)
            return stop.exit_code
        except UserError as error:
            message, code = str(error), error.exit_code
        except ModuleNotFoundError as error:
            message, code = f"{error.name} is not installed. Run 'pip install -r requirements.txt'.", 1
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                message, code = out_of_memory(), 1
            elif lost_contact(error):
                message, code = "Another process of this job is gone; its own message says why. Files are as last saved.", 1
            else:
                raise
        except KeyboardInterrupt:
            message, code = stopped, stop.exit_code
        rank = int(os.environ.get("RANK", 0))
        if rank == 0 or code == 1:  # bad flags and signals reach all processes alike: once is enough
            print(f"{name}:{f' process {rank}:' if rank else ''} {message}", file=sys.stderr)
        return code
