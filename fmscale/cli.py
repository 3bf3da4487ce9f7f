"""`fmscale COMMAND`: reads the command line, dispatches, and turns a user's mistake into one line and exit code 2.

Nothing heavy is imported before a command is known, so that `fmscale --help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import Any, NamedTuple

from fmscale import __version__
from fmscale.arguments import positive
from fmscale.drawing_arguments import (
    demo_arguments,
    evaluate_arguments,
    export_arguments,
    import_arguments,
    sample_arguments,
)
from fmscale.errors import OutageError, SharedError, UserError
from fmscale.training_arguments import (
    encode_arguments,
    pipe_argument,
    plan_arguments,
    reflow_arguments,
    submit_arguments,
    train_arguments,
)

_PATH_ERRORS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
DONE, FAULT, MISTAKE, INTERRUPTED = 0, 1, 2, 130


class Command(NamedTuple):
    """A row of the table of commands.

    Attributes:
        summary: one line for `fmscale --help`.
        example: a command line that runs.
        arguments: adds the command's arguments to its parser.
        run: does it; imports what it needs.
    """

    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]


def main(argv: Sequence[str]) -> int:
    """Run a command line.

    Args:
        argv: without the program's name.

    Returns:
        Exit code: 0 done, 2 the user's mistake, 1 a fault of ours or the machine's, 130 interrupted.
    """
    if not argv or argv[0] not in COMMANDS:
        _overview().parse_args(argv)  # prints help, version or what is wrong, and leaves
    command = COMMANDS[argv[0]]
    args = _parser(argv[0], command).parse_intermixed_args(argv[1:])
    args.command = argv[0]
    try:
        from fmscale import log

        log.setup()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="replace")  # what a terminal cannot show is no reason to fail
        return command.run(args) or DONE
    except SharedError as error:
        return _refuse(args.command, str(error)) if _rank() == "0" else MISTAKE
    except UserError as error:
        return _refuse(args.command, str(error))
    except OutageError as error:
        _say(args.command, str(error))
        return FAULT
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where = f" at {error.filename}" if error.filename else ""
            return _refuse(args.command, f"the disk is full{where} ({error.strerror}); make room, then run it again")
        if isinstance(error, _PATH_ERRORS) and error.filename:
            return _refuse(args.command, f"{error.filename}: {error.strerror}")
        raise
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        said = f"a process that reads the data has died ({error}); started again, the run goes on from its checkpoint"
        _say(args.command, said)
        return FAULT
    except KeyboardInterrupt:
        print(f"fmscale {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _refuse(command: str, why: str) -> int:
    _say(command, why)
    return MISTAKE


def _say(command: str, what: str) -> None:
    """One line on the error output, with the rank where there are several."""
    line = " ".join(what.split("\n"))
    print(f"fmscale {command}: {'' if _rank() == '0' else f'rank {_rank()}: '}{line}", file=sys.stderr)


def _rank() -> str:
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")


def _overview() -> argparse.ArgumentParser:
    """The parser of `fmscale` itself, which knows the commands' names and no more."""
    longest = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{longest}}  {command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="fmscale",
        description="Train text-conditioned MMDiT models with rectified flow, from one laptop core to a cluster.",
        epilog=f"commands:\n{listed}\n\n`fmscale COMMAND --help` tells more. Start with: fmscale quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fmscale {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    return parser


def _parser(name: str, command: Command) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"fmscale {name}",
        description=command.summary,
        epilog=f"example:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.arguments(parser)
    return parser


def _with_config(args: argparse.Namespace, run: Callable[[Any], object]) -> int:
    """Load the config that the command line names and hand it on, or print what was asked for; returns exit code 0."""
    from fmscale import config

    if args.print_schema:
        print(config.schema(args.command), end="")
        return DONE
    if args.config is None:
        raise UserError(f"give a config: fmscale {args.command} CONFIG [key=value …]")
    loaded = config.load(config.CONFIGS[args.command], args.config, args.overrides)
    if args.print_config:
        print(config.dump(loaded), end="")
        return DONE
    code = run(loaded)
    return code if isinstance(code, int) else DONE


def _quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="quickstart", metavar="DIR", help="new folder for everything (%(default)s)")
    parser.add_argument("--nproc", type=positive, default=1, metavar="N", help="local ranks that train (%(default)s)")


def _quickstart(args: argparse.Namespace) -> None:
    _program("quickstart").quickstart(_path(args.out), args.nproc)


def _encode(args: argparse.Namespace) -> int:
    return _shared(args, "encode")


def _shared(
    args: argparse.Namespace, name: str, instead: Callable[[Any], int | None] = lambda config: None, **options: Any
) -> int:
    """Run a program whose work any number of workers share, in this process or in several; or what `instead` does."""

    def run(config: object) -> int | None:
        if (code := instead(config)) is not None:
            return code
        program = _program(name)
        if args.nproc and args.nproc > 1:
            # Say what is wrong once, here, and not once per worker.
            _program("distributed").check_can_spawn(args.nproc)
            program.check_setup(config, **options)
            return _program("distributed").spawn_workers(_without_nproc(args), args.nproc)
        getattr(program, name)(config, **options)
        return DONE

    return _with_config(args, run)


def _index_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="folder of latent shards, or of tars of images")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--verify", action="store_true", help="read every byte and name what is damaged; exit code 2 then"
    )
    what.add_argument("--repair", action="store_true", help="write an index that leaves out what is damaged")
    what.add_argument(
        "--images",
        metavar="ENCODE",
        help="index tars of images, which `train` then encodes as this encode config would",
    )
    pipe_argument(parser)


def _index(args: argparse.Namespace) -> int | None:
    action = "verify" if args.verify else "repair" if args.repair else "images" if args.images else "index"
    return _program("indexing").index(args.dataset, action, args.allow_pipe, args.images)


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="indexed folder of latent shards")
    parser.add_argument("--html", default="inspect.html", metavar="FILE", help="page to write (%(default)s)")
    parser.add_argument("--vae", metavar="DIR", help="the VAE that made the latents; the page then shows pictures")
    parser.add_argument("--samples", type=positive, default=5000, metavar="N", help="to read (%(default)s)")
    parser.add_argument("--thumbnails", type=positive, default=24, metavar="N", help="to decode (%(default)s)")
    pipe_argument(parser)


def _inspect(args: argparse.Namespace) -> None:
    _program("inspection").inspect_command(args)


def _train(args: argparse.Namespace) -> int | None:
    def run(config: object) -> int | None:
        train = _program("train")
        allowed = train.Allowed(args.allow_config_change, args.allow_append, args.allow_pipe)
        if args.nproc and args.nproc > 1:
            # Say what is wrong once, here, and not once per rank.
            _program("distributed").check_can_spawn(args.nproc)
            train.check_setup(config, args.nproc, allowed)
            return _program("distributed").spawn(_without_nproc(args), args.nproc)
        return train.train(config, allowed)

    return _with_config(args, run)


def _without_nproc(args: argparse.Namespace) -> list[str]:
    """The command line of one rank."""
    return [args.command, *_allowed(args), args.config, *args.overrides]


def _allowed(args: argparse.Namespace) -> list[str]:
    """The flags that permit something, as they were given."""
    flags = ("allow_config_change", "allow_append", "allow_pipe")
    return [f"--{flag.replace('_', '-')}" for flag in flags if getattr(args, flag, False)]


def _submit(args: argparse.Namespace) -> int:
    submit = _program("submit")
    more = {"flags": _allowed(args), "workers": args.workers, "at_once": args.at_once}
    order = submit.read_order(args.program, args.config, args.site, args.overrides, **more)
    return submit.submit(order, args.dry_run, args.follow)


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", metavar="RUN", nargs="*", help="run directory (those of your jobs)")


def _status(args: argparse.Namespace) -> int:
    return _program("jobs").status(list(map(_path, args.folders)))


def _stop_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run directory, or dataset that is made")


def _logs_arguments(parser: argparse.ArgumentParser) -> None:
    _stop_arguments(parser)
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="(%(default)s)")


def _logs(args: argparse.Namespace) -> int:
    return _program("logs").show_log(_path(args.folder), args.rank)


def _requeue_arguments(parser: argparse.ArgumentParser) -> None:
    _stop_arguments(parser)
    parser.add_argument("code", metavar="CODE", type=int, help="exit code of what ran")


def _requeue(args: argparse.Namespace) -> int:
    return _program("requeue").requeue(_path(args.folder), args.code)


def _checkpoints_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="run directory")
    parser.add_argument("--verify", action="store_true", help="compare every file with its checksum")


def _checkpoints(args: argparse.Namespace) -> int:
    return _program("runs").list_checkpoints(_path(args.run_dir), args.verify)


def _sample(args: argparse.Namespace) -> None:
    _program("sample").sample_command(args)


def _export(args: argparse.Namespace) -> None:
    _program("export").export_command(args)


def _evaluate(args: argparse.Namespace) -> None:
    _program("evaluate").evaluate_command(args)


def _reflow(args: argparse.Namespace) -> int:
    def in_rounds(config: Any) -> int | None:
        if config.rounds is None:
            return None
        _program("rounds").rounds(config, args.nproc or 1, args.allow_pipe)
        return DONE

    return _shared(args, "reflow", in_rounds, allow_pipe=args.allow_pipe)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="whose disk is checked (this one)")
    parser.add_argument("--json", action="store_true", help="print data, not a table")


def _doctor(args: argparse.Namespace) -> int:
    return _program("doctor").doctor(_path(args.folder), args.json)


def _program(name: str) -> Any:
    return importlib.import_module(f"fmscale.{name}")


def _path(text: str) -> Any:
    from pathlib import Path

    return Path(text)


COMMANDS = {
    "quickstart": Command(
        "bundled real images -> shards -> encode -> train -> sample -> export, on CPU or GPU",
        "fmscale quickstart --out quickstart",
        _quickstart_arguments,
        _quickstart,
    ),
    "encode": Command(
        "images and captions -> indexed latent shards",
        "fmscale encode configs/encode_sd3.yaml images=/data/photos out=/data/latents",
        encode_arguments,
        _encode,
    ),
    "index": Command(
        "index the tars of a dataset, or check an indexed dataset byte for byte",
        "fmscale index /data/latents --verify",
        _index_arguments,
        _index,
    ),
    "inspect": Command(
        "what a dataset holds: buckets, captions, bytes, and a page with pictures",
        "fmscale inspect quickstart/latents --html latents.html",
        _inspect_arguments,
        _inspect,
    ),
    "plan": Command(
        "whether a run fits, how long it takes, what it costs and what to change, before it runs",
        "fmscale plan configs/sd3_medium_256.yaml --world-size 64 --device h100",
        plan_arguments,
        lambda args: _program("plan").plan_command(args),
    ),
    "train": Command(
        "train; a run directory that holds a checkpoint is resumed",
        "fmscale train quickstart/train.yaml --nproc 2 run_dir=runs/mine steps=200",
        train_arguments,
        _train,
    ),
    "submit": Command(
        "the same on Slurm; the job saves, leaves and comes back as often as it must",
        "fmscale submit train configs/sd3_medium_256.yaml --site launch/sites/gpus.yaml site.nodes=4",
        submit_arguments,
        _submit,
    ),
    "status": Command(
        "what Slurm and their folders say of runs",
        "fmscale status runs/sd3",
        _status_arguments,
        _status,
    ),
    "stop": Command(
        "save and end a run on Slurm for good",
        "fmscale stop runs/sd3",
        _stop_arguments,
        lambda args: _program("jobs").stop(_path(args.folder)),
    ),
    "logs": Command(
        "what a rank of a run's last job has printed",
        "fmscale logs runs/sd3 --rank 3",
        _logs_arguments,
        _logs,
    ),
    "requeue": Command(
        "the last line of a batch script: whether its job comes back",
        "fmscale requeue runs/sd3 1",
        _requeue_arguments,
        _requeue,
    ),
    "checkpoints": Command(
        "list a run's checkpoints, and which of them are sound",
        "fmscale checkpoints quickstart/run --verify",
        _checkpoints_arguments,
        _checkpoints,
    ),
    "sample": Command(
        "prompts -> images, from a run or an exported folder",
        'fmscale sample quickstart/run --prompt "a handwritten seven" --guidance-scale 4',
        sample_arguments,
        _sample,
    ),
    "demo": Command(
        "a page on this machine that draws what one types, from one run or export, or from two side by side",
        "fmscale demo quickstart/run quickstart/export",
        demo_arguments,
        lambda args: _program("demo").demo_command(args),
    ),
    "evaluate": Command(
        "how well trained weights do on a dataset: loss, FID, CLIP score and more, by number of steps",
        "fmscale evaluate quickstart/run --data quickstart/latents --out evaluation --images 64",
        evaluate_arguments,
        _evaluate,
    ),
    "export": Command(
        "a run -> a folder of diffusers, or a single file, read back and compared",
        "fmscale export quickstart/run exported --dtype fp32",
        export_arguments,
        _export,
    ),
    "import": Command(
        "published weights -> a run directory to sample, reflow or train from, compared with diffusers",
        "fmscale import quickstart/export imported",
        import_arguments,
        lambda args: _program("importing").import_command(args),
    ),
    "reflow": Command(
        "a trained run -> (noise, latent) pairs, a dataset that train takes with flow.coupling=paired",
        "fmscale reflow configs/reflow.yaml teacher=quickstart/run out=pairs",
        reflow_arguments,
        _reflow,
    ),
    "doctor": Command(
        "whether this machine can train, and what to do where it cannot; exit code 1 then",
        "fmscale doctor /data/runs",
        _doctor_arguments,
        _doctor,
    ),
}
