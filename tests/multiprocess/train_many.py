"""One rank of a test: several trainings in one process, since starting a process costs more than all of them."""

import json
import sys

from fmscale import log
from fmscale.config import TrainConfig, check
from fmscale.train import train

if __name__ == "__main__":
    log.setup()
    for data in json.loads(sys.argv[1]):
        train(check(TrainConfig, data, "test"))
