"""A rank that is watched and does nothing, until rank 0 stops itself and rank 1 ends with an error; alone, it hangs."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from fmscale.distributed import world_from_environment
from fmscale.watchdog import Limits, Watchdog

if __name__ == "__main__":
    world = world_from_environment()
    torch.distributed.init_process_group("gloo")
    with Watchdog(world, Path(sys.argv[1]), Limits(silent_s=1000, stalled_s=2)):
        if world.world_size == 1:
            time.sleep(1000)
        if world.is_main:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(4)  # by when the thread that asks rank 0 waits for it
        raise ValueError("an error of rank 1")
