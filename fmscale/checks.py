"""What `fmscale doctor` looks at: functions from a folder to findings, which raise where they cannot look."""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import pkgutil
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from fmscale.distributed import World, free_port
from fmscale.files import locked, new_folder, replace_text, sync

OK, WARNING, FAILURE = "ok", "warning", "failure"
TEMPORARY = ".fmscale-doctor-"
CAUSE_LENGTH = 300

# What the programs import, down to a name where the library only pretends to be loaded until it is asked for one.
IMPORTS = (
    "torch",
    "torchvision",
    "deepspeed",
    "diffusers:StableDiffusion3Pipeline",
    "transformers:T5EncoderModel",
    "open_clip",
    "webdataset",
    "submitit",
    "torch.utils.tensorboard:SummaryWriter",
    "pydantic",
    "yaml",
    "safetensors.torch",
    "numpy",
    "fsspec",
    "huggingface_hub",
    "braceexpand",
    "zlib_ng.zlib_ng",
    "PIL.Image",
    "rich",
    "scipy.optimize",
    "sklearn.svm",
    "sentencepiece",
    "packaging",
)
FREE_BYTES, ENOUGH_BYTES = 10**9, 20 * 10**9  # a failure below the first, a warning below the second
WRITTEN_MIB = 32
SLOW_MB_PER_S = 50
REPLACEMENTS = 20
SHARED_BYTES = 10**9
OPEN_FILES = 1024
ALL_REDUCE_MIB = 16
COLLECTIVE_S = 60
BF16_CAPABILITY = (8, 0)


class Finding(NamedTuple):
    """A row of the table.

    Attributes:
        check: what was looked at.
        found: what is there.
        verdict: `ok`, `warning` or `failure`.
        remedy: what to do; empty where nothing has to be done.
    """

    check: str
    found: str
    verdict: str = OK
    remedy: str = ""


def cause(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        text = f"{type(error).__name__}: {first}"
    return text[:CAUSE_LENGTH]


def python_command(program: str, *arguments: str) -> list[str]:
    """The command line of a Python process that finds the modules that this one finds."""
    return [sys.executable, "-c", f"import sys; sys.path = {sys.path!r}; {program}", *arguments]


def _judged(check: str, found: str, fine: bool, remedy: str, otherwise: str = FAILURE) -> Finding:
    return Finding(check, found) if fine else Finding(check, found, otherwise, remedy)


# Python and packages


def versions(folder: Path) -> list[Finding]:
    """Python and every package that fmscale asks for, against the versions that it asks for."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    described = metadata.metadata("fmscale")
    wanted = SpecifierSet(described["Requires-Python"])
    python = platform.python_version()
    remedy = f"install Python {wanted}, and fmscale for it"
    required = [Requirement(text) for text in metadata.requires("fmscale") or ()]
    return [
        _judged("python", python, wanted.contains(python, prereleases=True), remedy),
        *(package(str(each)) for each in required if not each.marker or each.marker.evaluate({"extra": ""})),
    ]


def package(requirement: str) -> Finding:
    """One package, installed or not.

    Args:
        requirement: such as `numpy>=2.0`.
    """
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    remedy = f'pip install "{wanted.name}{wanted.specifier}"'
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Finding(wanted.name, "not installed", FAILURE, remedy)
    fine = wanted.specifier.contains(found, prereleases=True)
    return _judged(wanted.name, found if fine else f"{found}; fmscale needs {wanted.specifier}", fine, remedy)


def imports(folder: Path) -> list[Finding]:
    """Whether the packages load: versions that fit one by one may not fit together."""
    return import_all(IMPORTS)


def import_all(names: Sequence[str]) -> list[Finding]:
    """Import modules, or names in modules (`MODULE:NAME`); one finding for each that fails, or one for all."""
    began, failed = time.monotonic(), []
    for name in names:
        print(f"while importing {name}", file=sys.stderr, flush=True)  # the last words, should it crash
        try:
            pkgutil.resolve_name(name)
        except Exception as error:
            remedy = "`pip check` names packages that do not fit; install those again"
            failed.append(Finding(f"import {name.partition(':')[0]}", cause(error), FAILURE, remedy))
    return failed or [Finding("imports", f"all {len(names)} load, in {time.monotonic() - began:.0f} s")]


# GPUs and compilers


def gpus(folder: Path) -> list[Finding]:
    """NCCL, the driver, and every GPU that this process may use."""
    import torch

    has_nccl = torch.distributed.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "not in this torch"
    if not torch.cuda.is_available() and not any(Path("/dev").glob("nvidia[0-9]*")):
        remedy = "nothing, for small models; else install NVIDIA's driver, or start the container with --gpus all"
        return [Finding("NCCL", nccl), Finding("GPUs", "none; training runs on the CPU", WARNING, remedy)]
    found = [
        _judged("NCCL", nccl, has_nccl, "install a torch that was built with CUDA"),
        cuda(driver_cuda(), torch.version.cuda),
    ]
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        remedy = "does nvidia-smi run? Does CUDA_VISIBLE_DEVICES name GPUs that are there?"
        return [*found, Finding("GPUs", cause(error), FAILURE, remedy)]
    count = torch.cuda.device_count()
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        capability = (properties.major, properties.minor)
        found.append(gpu(number, properties.name, properties.total_memory, capability, torch.cuda.get_arch_list()))
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    apart = [f"{i}-{j}" for i, j in pairs if not torch.cuda.can_device_access_peer(i, j)]
    if pairs:
        remedy = "NCCL goes through host memory, which is slower; on a server look at ACS and the IOMMU"
        said = f"none between {' '.join(apart)}" if apart else "between all pairs"
        found.append(_judged("peer access of GPUs", said, not apart, remedy, WARNING))
    return found


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver knows, (major, minor); None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def cuda(driver: tuple[int, int] | None, built: str | None) -> Finding:
    """Whether a driver can run what torch was built for.

    Args:
        driver: from `driver_cuda`.
        built: `torch.version.cuda`, such as `13.2`; None for a torch without CUDA.

    Source: minor version compatibility, CUDA's compatibility guide.
    """
    if built is None:
        return Finding("CUDA", "this torch was built without CUDA", FAILURE, "install a torch that was built with CUDA")
    if driver is None:
        remedy = "install NVIDIA's driver, or start the container with --gpus all"
        return Finding("CUDA", "GPUs, but no driver (libcuda.so.1)", FAILURE, remedy)
    said = f"torch was built for {built}, the driver knows {driver[0]}.{driver[1]}"
    remedy = f"update the driver, or install a torch that was built for CUDA {driver[0]}"
    return _judged("CUDA", said, driver[0] >= int(built.split(".")[0]), remedy)


def gpu(number: int, name: str, memory: int, capability: tuple[int, int], built_for: Sequence[str]) -> Finding:
    """Whether a GPU is one that torch runs on, and multiplies in bf16.

    Args:
        number: as torch counts.
        name: of the model.
        memory: in bytes.
        capability: compute capability, (major, minor).
        built_for: `torch.cuda.get_arch_list()`.
    """
    check, said = (
        f"GPU {number}",
        f"{name}, {memory / 2**30:.0f} GiB, compute capability {capability[0]}.{capability[1]}",
    )
    if not any(_runs_on(architecture, capability) for architecture in built_for):
        return Finding(
            check, f"{said}; torch has no code for it", FAILURE, "install a torch that was built for this GPU"
        )
    remedy = "it computes bf16 slowly or not at all: engine.dtype=fp32"
    return _judged(check, said, capability >= BF16_CAPABILITY, remedy, WARNING)


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code (sm_90) runs on its own major version from its minor version on, PTX (compute_90) on all later."""
    kind, _, digits = architecture.partition("_")
    built = divmod(int(re.sub(r"\D", "", digits)), 10)
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def compilers(folder: Path) -> list[Finding]:
    """The programs with which torch.compile and DeepSpeed build kernels."""
    remedy = "engine.compile=true needs one: apt install g++, or the like"
    compiler = program_version(os.environ.get("CXX", "g++"))
    found = [_judged("C++ compiler", compiler or "none", bool(compiler), remedy, WARNING)]
    for name in ("nvcc", "ninja"):
        version = program_version(name) or "none; only DeepSpeed's own kernels would need it"
        found += [Finding(name, version)]
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none; engine.compile=true needs it on GPUs"
    return [*found, Finding("triton", triton)]


def program_version(name: str) -> str | None:
    """What a program says of its version; None where there is no such program."""
    if (path := shutil.which(name)) is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return next((line for line in said.splitlines() if re.search(r"\d+\.\d", line)), "says no version")


def torch_compile(folder: Path) -> list[Finding]:
    """Compile a small function for the device that would train, and compare what it computes."""
    began = time.monotonic()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as cache:  # nothing that was compiled before
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        import torch

        def function(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(2 * x + 1).sum(-1)

        device = World(0, 0, 1).device
        x = torch.linspace(-2, 2, 64 * 64, device=device).view(64, 64)
        difference = (torch.compile(function, dynamic=False)(x) - function(x)).abs().max().item()
    said = f"a function for {device.type} in {time.monotonic() - began:.0f} s, off by {difference:.1g}"
    return [_judged("torch.compile", said, difference < 1e-3, "leave engine.compile=false", WARNING)]


# disk


def free_space(folder: Path) -> list[Finding]:
    """Room for checkpoints."""
    usage = shutil.disk_usage(folder)
    return [space(usage.free, usage.total)]


def space(free: int, total: int) -> Finding:
    """Whether so many bytes of a disk will do."""
    said = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB"
    remedy = "make room: a checkpoint takes 12 bytes a parameter, and 4 for each average"
    return _judged("free space", said, free >= ENOUGH_BYTES, remedy, FAILURE if free < FREE_BYTES else WARNING)


def writing(folder: Path) -> list[Finding]:
    """Write a file to the disk itself; it has no name, so that nothing is left of it whatever happens."""
    block = os.urandom(2**20)  # which no file system compresses
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(WRITTEN_MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = WRITTEN_MIB * 2**20 / 1e6 / (time.perf_counter() - began)
    remedy = "checkpoints will take long: run_dir on another disk"
    return [
        _judged("writing", f"{WRITTEN_MIB} MiB at {speed:.0f} MB/s, synced", speed >= SLOW_MB_PER_S, remedy, WARNING)
    ]


def renaming(folder: Path) -> list[Finding]:
    """Replace a file while it is read, and a folder, as every checkpoint is put in place."""
    texts = {letter * 10_000 for letter in "ab"}
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as place, ThreadPoolExecutor() as pool:
        file, through = Path(place) / "file", threading.Event()
        replace_text(file, min(texts))
        reading = pool.submit(_read_until, through, file)
        try:
            for _ in range(REPLACEMENTS // len(texts)):
                for text in texts:
                    replace_text(file, text)
        finally:
            through.set()
        with new_folder(Path(place) / "folder") as made:
            sync(made)
        whole = reading.result() <= texts and (Path(place) / "folder").is_dir()
    said = f"{REPLACEMENTS} files replaced at once" if whole else "a reader saw neither the old file nor the new one"
    return [_judged("renaming", said, whole, "a crash may leave a broken checkpoint: run_dir on another disk")]


def _read_until(through: threading.Event, file: Path) -> set[str]:
    """Every text that a file has had until the event; an empty one where it was not there."""
    seen = set()
    while not through.is_set():
        try:
            seen.add(file.read_text())
        except OSError:
            seen.add("")
    return seen


def locking(folder: Path) -> list[Finding]:
    """Hold a lock, and see that nobody else gets it."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as place:
        file = Path(place) / "lock"
        with locked(file), file.open("w") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return [Finding("locking", "a lock keeps others out")]
    return [Finding("locking", "two had the same lock", WARNING, "data.remote.cache on another disk")]


# limits of the system


def shared_memory(folder: Path) -> list[Finding]:
    """Where the processes that read the data put batches."""
    return [shared_room(shutil.disk_usage("/dev/shm").total)]


def shared_room(size: int) -> Finding:
    """Whether so many bytes of shared memory will do."""
    remedy = "readers may die of SIGBUS: docker run --shm-size=8g, or the like; or data.workers=0"
    return _judged("shared memory", f"{size / 1e9:.2f} GB in /dev/shm", size >= SHARED_BYTES, remedy, WARNING)


def open_files(folder: Path) -> list[Finding]:
    """The limit of files that a process may have open: shards, and the batches that readers hand over."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit = math.inf if soft == resource.RLIM_INFINITY else soft
    return [_judged("open files", f"up to {limit}", limit >= OPEN_FILES, f"ulimit -n {64 * OPEN_FILES}", WARNING)]


# two processes


def two_processes(folder: Path) -> list[Finding]:
    """An all-reduce by gloo, and by NCCL where there are two GPUs."""
    found = [_pair("gloo")]
    import torch

    return [*found, _pair("nccl")] if torch.cuda.device_count() > 1 else found


def _pair(backend: str) -> Finding:
    port = free_port()
    program = "from fmscale.checks import all_reduce; all_reduce(1, int(sys.argv[1]), sys.argv[2])"
    other = subprocess.Popen(python_command(program, str(port), backend))
    try:
        seconds = all_reduce(0, port, backend)
        other.wait()
    finally:
        other.kill()
    return Finding(f"{backend}, 2 processes", f"all-reduce of {ALL_REDUCE_MIB} MiB in {1e3 * seconds:.1f} ms")


def all_reduce(rank: int, port: int, backend: str) -> float:
    """Sum over two ranks, of which this is one.

    Returns:
        The least time of five, in seconds.

    Raises:
        RuntimeError: the ranks do not find one another, or the sum is wrong.
    """
    import torch

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    times = []
    for _ in range(5):
        values = torch.full((ALL_REDUCE_MIB * 2**18,), rank + 1.0, device=device)
        torch.distributed.barrier()
        began = time.perf_counter()
        torch.distributed.all_reduce(values)
        least, most = (bound.item() for bound in values.aminmax())
        times.append(time.perf_counter() - began)
        if (least, most) != (3, 3):
            raise RuntimeError(f"1 + 2 over two ranks is {least} to {most}")
    torch.distributed.destroy_process_group()
    return min(times)


def slurm(folder: Path) -> list[Finding]:
    """Whether this is a machine of a Slurm cluster."""
    programs = [name for name in ("sbatch", "srun", "scontrol", "squeue", "sacct") if shutil.which(name)]
    return [Finding("Slurm", " ".join(programs) if programs else "no commands of it here")]
