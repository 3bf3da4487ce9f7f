"""`fmscale plan`: what a run will need, on a login node, in seconds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmscale import config as configs
from fmscale.config import TrainConfig
from fmscale.errors import UserError
from fmscale.log import get_logger
from fmscale.planning.advice import GIB, Advice, advice_of, refusals
from fmscale.planning.devices import CPU, DEVICES, NETWORK_GB_PER_S, Cluster, Device, Rates, check_device, stated_rates
from fmscale.planning.plans import PhasePlan, Plan, plan_of, scaling
from fmscale.planning.report import DAY_S, data_of, first_lines, lines_of
from fmscale.site import Site, processes_per_node, worlds

log = get_logger(__name__)
DEFAULT_DEVICE, DEFAULT_PER_NODE = "h100", 8


def plan_command(args: argparse.Namespace) -> None:
    """`fmscale plan`.

    Raises:
        UserError: the run could not go on as planned; the plan is shown all the same.
    """
    if args.plot:
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
    if args.plot:
        from fmscale.plots import write_plan_plot

        write_plan_plot(data_of(plan, rows, advice, why), Path(args.plot))
    _show(args, plan, rows, advice, why)
    if why:
        raise UserError("; ".join(why))


def _show(
    args: argparse.Namespace, plan: Plan, rows: Sequence[Any], advice: Sequence[Sequence[Advice]], why: Sequence[str]
) -> None:
    if args.json:
        print(json.dumps(data_of(plan, rows, advice, why), indent=1, allow_nan=False))
        return
    for line in lines_of(plan, list(rows), advice, args.price):
        print(line)


def cluster_of(args: argparse.Namespace, config: TrainConfig, site: Site | None) -> Cluster:
    """Where a command line plans a run."""
    dtype, network = config.engine.dtype, args.network_gbit / 8 * 1e9
    per_node = args.gpus_per_node or (DEFAULT_PER_NODE if site is None else processes_per_node(site))
    if args.calibrate:
        if args.device:
            raise UserError("--device: --calibrate measures the device at hand; leave one of them out")
        from fmscale.planning.calibrate import calibrate

        return Cluster(*calibrate(dtype), per_node, network)
    given = args.device or (None if site is None else site.device) or DEFAULT_DEVICE
    name = check_device(given, "--device" if args.device else "site.device")
    rates = stated_rates(name, dtype) if args.rates is None else read_rates(Path(args.rates))
    return Cluster(name, DEVICES.get(name), rates, per_node, network)


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
    cluster = Cluster(
        name, DEVICES.get(name), stated_rates(name, config.engine.dtype), processes_per_node(site), network
    )
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
        raise UserError(f"engine.zero_stage: a rank holds {held:.1f} GiB, more than a {name} has; see `fmscale plan`")
    if phase.fullest.memory.total > gpu.usable:
        log.warning("a rank may run out of memory: `fmscale plan` says what to change")


def read_rates(path: Path) -> Rates:
    """What another machine measured.

    Raises:
        UserError: the file holds no rates.
    """
    try:
        found = json.loads(path.read_text())["rates"]
        gemm, attention, copy, link = (float(found[name]) for name in ("gemm", "attention", "copy", "link"))
        if not all(0 < rate < float("inf") for rate in (gemm, attention, copy)) or not 0 <= link < float("inf"):
            raise ValueError("a rate is no number above 0")
        return Rates(gemm, attention, copy, link, f"{path}, {found['source']}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--rates: {path} is not what `fmscale plan --calibrate --json` prints ({error})") from None


def _check_plot(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--plot: {path} cannot be written; give a file in a folder that is there")
