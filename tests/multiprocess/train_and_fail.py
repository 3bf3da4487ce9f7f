"""A training that ends by an error of ours in mid-run, while processes read the data."""

import json
import sys

import fmscale.train as training
from fmscale.config import TrainConfig, check

if __name__ == "__main__":

    def fail(*args: object) -> None:
        raise ValueError("an error that nobody expected")

    training.look_at = fail
    training.train(check(TrainConfig, json.loads(sys.argv[1]), "test"))
