"""One rank of a test: each has a file of its own, in which it has found another kernel than the others."""

import json
import sys
from pathlib import Path

import torch

from fmscale.distributed import world_from_environment
from fmscale.engine.attention import Shape, agree, device_name
from fmscale.errors import SharedError

if __name__ == "__main__":
    world = world_from_environment()
    torch.distributed.init_process_group("gloo")
    shape = Shape(2, 2, 12, 12, 8, torch.float32, torch.device("cpu"), 1)
    file = Path(sys.argv[1]) / f"{world.rank}.json"
    kernels = {shape.name: ("math", "flash")[world.rank]}
    file.write_text(json.dumps({"device": device_name(shape.device), "torch": torch.__version__, "kernels": kernels}))
    said = [agree("auto", {"a bucket": shape}, file, world)[0]["a bucket"]]
    try:
        agree("cudnn", {"a bucket": shape}, file, world)
    except SharedError as error:
        said.append(str(error))
    print(json.dumps(said))
    torch.distributed.destroy_process_group()
