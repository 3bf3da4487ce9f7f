"""`fmscale plan`: what a run will need, on a login node, in seconds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fmscale import config as configs
from fmscale.config import TrainConfig
from fmscale.errors import UserError
from fmscale.log import get_logger
from fmscale.planning.advice import GIB, advice_of, refusals
from fmscale.planning.devices import CPU, DEVICES, NETWORK_GB_PER_S, Cluster, Device, Rates, check_device, stated_rates
from fmscale.planning.plans import PhasePlan, plan_of, scaling
from fmscale.planning.report import DAY_S, data_of, first_lines, lines_of
from fmscale.site import Site, processes_per_node, worlds

log = get_logger(__name__)
DEFAULT_DEVICE, DEFAULT_PER_NODE = "h100", 8
MOST_RATE = 1e20  # of FLOP or bytes in a second: no machine comes near


def plan_command(args: argparse.Namespace) -> None:
    """`fmscale plan`.

    Raises:
        UserError: the run could not go on as planned; the plan is shown all the same.
    """
    if args.plot is not None:
        _check_plot(Path(args.plot))
    for_site = [each.removeprefix("site.") for each in args.overrides if each.startswith("site.")]
    for_config = [each for each in args.overrides if not each.startswith("site.")]
    if for_site and args.site is None:
        raise UserError(f"site.{for_site[0]}: there is no site file to lay it over; give --site SITE")
    config = configs.load(TrainConfig, args.config, for_config)
    site = None if args.site is None else configs.load(Site, args.site, for_site)
    cluster = cluster_of(args, config, site)
    world_size = args.world_size or (1 if site is None else worlds(site)[1])
    plan = plan_of(config, world_size, cluster, args.allow_pipe)
    rows = [] if cluster.rates is None else scaling(plan.phases[-1], cluster)
    advice = [advice_of(plan, phase, rows if phase is plan.phases[-1] else []) for phase in plan.phases]
    why = refusals(plan, site)
    if site is not None and args.world_size is None and (least := worlds(site)[0]) < world_size:
        fewer = refusals(plan_of(config, least, cluster, args.allow_pipe), site)
        why += [f"with {least} ranks: {each}" for each in fewer if each not in why]
    data = data_of(plan, rows, advice, why, args.price)
    if args.json:
        print(json.dumps(data, indent=1, allow_nan=False))
    else:
        print("\n".join(lines_of(plan, rows, advice, args.price)))
    if args.plot is not None:
        from fmscale.plots import write_plan_plot

        write_plan_plot(data, Path(args.plot))
    if why:
        raise UserError("; ".join(why))


def cluster_of(args: argparse.Namespace, config: TrainConfig, site: Site | None) -> Cluster:
    """Where a command line plans a run."""
    dtype, network = config.engine.dtype, args.network_gbit / 8 * 1e9
    if not 1 <= network <= MOST_RATE:
        raise UserError(f"--network-gbit: {args.network_gbit:g}; no adapter has that")
    per_node = args.gpus_per_node or (DEFAULT_PER_NODE if site is None else processes_per_node(site))
    if args.calibrate:
        if args.device is not None:
            raise UserError("--device: --calibrate measures the device at hand; leave one of them out")
        from fmscale.planning.calibrate import calibrate

        return Cluster(*calibrate(dtype), per_node, network)
    rates, measured = (None, None) if args.rates is None else read_rates(Path(args.rates), dtype)
    if args.device is not None:
        name = check_device(args.device, "--device")
    elif site is not None and (site.device or measured is None):
        name = check_device(site.device or (DEFAULT_DEVICE if site.gpus_per_node else CPU), "site.device")
    else:
        name = check_device(measured or DEFAULT_DEVICE, f"--rates: give --device too: {args.rates}")
    return Cluster(name, DEVICES.get(name), rates or stated_rates(name, dtype), per_node, network)


def tell(config: TrainConfig, site: Site) -> None:
    """Say what a job will run, and, where its site names a device, what that needs.

    Args:
        config: of `train`.
        site: where it is submitted.

    Raises:
        UserError: what a rank holds between steps is more than the device has.
    """
    name = check_device(site.device or CPU, "site.device")
    network = NETWORK_GB_PER_S * 1e9
    rates, per_node = stated_rates(name, config.engine.dtype), processes_per_node(site)
    cluster = Cluster(name, DEVICES.get(name), rates, per_node, network)
    for world_size in dict.fromkeys(worlds(site)):
        for phase in plan_of(config, world_size, cluster, remote=False).phases:
            for line in first_lines(phase):
                log.info("%s", line)
            if cluster.gpu is not None:
                _tell_memory(phase, cluster.gpu, name)


def _tell_memory(phase: PhasePlan, gpu: Device, name: str) -> None:
    fullest, held = phase.fullest.memory.total / GIB, phase.base.device / GIB
    assert phase.step is not None
    pace = f"{phase.step.total:.3f} s a step, {phase.seconds / DAY_S:.2f} days"
    log.info("plan     %s, %.1f GiB of a rank's memory, of %.1f", pace, fullest, gpu.usable / GIB)
    if phase.base.device > gpu.memory:
        raise UserError(f"engine.zero_stage: a rank holds {held:.1f} GiB, more than {name} has; see `fmscale plan`")
    if phase.fullest.memory.total > gpu.usable:
        log.warning("a rank may run out of memory: `fmscale plan` says what to change")


def read_rates(path: Path, dtype: str) -> tuple[Rates, str | None]:
    """What another machine measured, and what it is, if the file tells.

    Args:
        path: of what `fmscale plan --calibrate --json` printed.
        dtype: that the rates have to be of.

    Raises:
        UserError: the file holds no such rates.
    """
    try:
        record = json.loads(path.read_text())
        found, device, measured = record["rates"], record.get("device"), record.get("dtype", dtype)
        rates = [found[name] for name in ("gemm", "attention", "copy", "link")]
        least = (1, 1, 1, 0)  # one GPU alone has no link
        sound = (isinstance(rate, int | float) and not isinstance(rate, bool) for rate in rates)
        within = (low <= rate <= MOST_RATE for low, rate in zip(least, rates, strict=True))
        if not all(sound) or not all(within) or not isinstance(device, str | None):
            raise ValueError
        source = str(found["source"]).splitlines()[0]
    except OSError as error:
        raise UserError(f"--rates: {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"--rates: {path} is not what `fmscale plan --calibrate --json` prints") from None
    if measured != dtype:
        raise UserError(f"--rates: {path} was measured in {measured}, and engine.dtype is {dtype}; measure that")
    gemm, attention, copy, link = map(float, rates)
    return Rates(gemm, attention, copy, link, f"{path}, {source}"), device


def _check_plot(path: Path) -> None:
    if path.suffix.lower() != ".png" or path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--plot: {path} cannot be written; give a .png in a folder that is there")
