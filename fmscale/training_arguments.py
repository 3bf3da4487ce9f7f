"""The command lines of the programs that a config tells what to do; like `cli`, it imports nothing heavy."""

from __future__ import annotations

import argparse

from fmscale.arguments import above_zero, positive


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """A config, and what is laid over it."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file; its `base:` names the one it builds on")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="laid over the file, such as optimizer.lr=1e-4"
    )
    parser.add_argument("--print-config", action="store_true", help="print the merged config and stop")
    parser.add_argument("--print-schema", action="store_true", help="print the JSON schema for editors and stop")


def encode_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `fmscale encode`."""
    config_arguments(parser)
    workers_argument(parser)


def workers_argument(parser: argparse.ArgumentParser) -> None:
    """Local workers that share the work."""
    parser.add_argument(
        "--nproc", type=positive, metavar="N", help="start N local workers, one per GPU where there are"
    )


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `fmscale train`."""
    config_arguments(parser)
    parser.add_argument("--nproc", type=positive, metavar="N", help="start N local ranks; leave out under a launcher")
    allow_arguments(parser)


def allow_arguments(parser: argparse.ArgumentParser) -> None:
    """What a run may go on with."""
    parser.add_argument(
        "--allow-config-change", action="store_true", help="go on in a run directory although its config differs"
    )
    parser.add_argument(
        "--allow-append", action="store_true", help="take in shards that were added, from each bucket's next epoch on"
    )
    pipe_argument(parser)


def pipe_argument(parser: argparse.ArgumentParser) -> None:
    """Whether programs of datasets are started."""
    parser.add_argument("--allow-pipe", action="store_true", help="start the programs of `pipe:` datasets")


def site_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """A config, a site, and what is laid over both."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file that says what")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="laid over CONFIG; site.key=value over SITE")
    parser.add_argument("--site", required=required, metavar="SITE", help="YAML file that says where")


def submit_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `fmscale submit`."""
    shared = ("train", "encode", "reflow")
    parser.add_argument("program", metavar="COMMAND", choices=shared, help=", ".join(shared))
    site_arguments(parser, required=True)
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and stop")
    parser.add_argument("--follow", action="store_true", help="show the log of rank 0 until the job has ended")
    parser.add_argument("--workers", type=positive, metavar="N", help="encode, reflow: an array of N tasks shares it")
    parser.add_argument("--at-once", type=positive, metavar="N", help="most of them that run at the same time (all)")
    allow_arguments(parser)


def reflow_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `fmscale reflow`."""
    config_arguments(parser)
    workers_argument(parser)
    pipe_argument(parser)


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `fmscale plan`."""
    site_arguments(parser, required=False)
    parser.add_argument("--world-size", type=positive, metavar="N", help="ranks, one per GPU (those of SITE, else 1)")
    parser.add_argument("--device", metavar="NAME", help="of each rank, such as h100, a100 or cpu (SITE's, else h100)")
    parser.add_argument("--gpus-per-node", type=positive, metavar="N", help="(those of SITE, else 8)")
    parser.add_argument(
        "--network-gbit", type=above_zero, default=400.0, metavar="X", help="of each GPU's adapter (%(default)g)"
    )
    parser.add_argument("--price", type=above_zero, metavar="X", help="of a GPU-hour, in any currency")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--calibrate", action="store_true", help="measure this machine for 10 s, and plan for it")
    rates.add_argument("--rates", metavar="FILE", help="what `plan --calibrate --json` printed on such a machine")
    parser.add_argument("--json", action="store_true", help="print data, not lines")
    parser.add_argument("--plot", metavar="FILE", help="draw memory and scaling to this PNG")
    pipe_argument(parser)
