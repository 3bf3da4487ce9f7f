"""One rank of a training in which rank 1 never comes back from its sixth step."""

import json
import os
import sys
import threading

import fmscale.train as training
from fmscale import log
from fmscale.config import TrainConfig, check

if __name__ == "__main__":
    log.setup()
    draw_step = training.draw_step

    def hang(config: TrainConfig, step: int, encoders: int, bucket: tuple[int, int]) -> object:
        if step == 5 and os.environ["RANK"] == "1":
            threading.Event().wait()
        return draw_step(config, step, encoders, bucket)

    training.draw_step = hang
    training.train(check(TrainConfig, json.loads(sys.argv[1]), "test"))
