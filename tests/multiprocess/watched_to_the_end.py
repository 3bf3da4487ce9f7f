"""A watched rank that ends well, while rank 0, which keeps the store that all talk to, stands still after their last
meeting, as on a busy machine: rank 1, which talks without a pause, waits for it in the store."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from fmscale import watchdog
from fmscale.distributed import barrier, world_from_environment

if __name__ == "__main__":
    world = world_from_environment()
    torch.distributed.init_process_group("gloo")

    def last_barrier() -> None:
        barrier()
        if world.is_main:
            subprocess.Popen(["sh", "-c", 'sleep "$0"; kill -CONT "$1"', sys.argv[2], str(os.getpid())])
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(0.2)  # by when rank 0 stands still

    if not world.is_main:
        watchdog.BEAT_S = 1e-4
    with watchdog.Watchdog(world, Path(sys.argv[1]), watchdog.Limits(silent_s=60, stalled_s=60)):
        watchdog.barrier = last_barrier
