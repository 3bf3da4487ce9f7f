"""The command lines of the programs that use trained weights; like `cli`, it imports nothing heavy."""

from __future__ import annotations

import argparse

from fmscale.arguments import above_zero, finite, licence, port, positive, width


def sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `fmscale sample`."""
    parser.add_argument("source", metavar="RUN_OR_EXPORT", help="run directory, or exported pipeline folder")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="text file with one prompt a line")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from (the empty caption)")
    parser.add_argument(
        "--out", default="samples.png", metavar="FILE", help="PNG, prompts under the images (%(default)s)"
    )
    parser.add_argument("--images", type=positive, default=4, metavar="N", help="per prompt (%(default)s)")
    parser.add_argument("--height", type=positive, metavar="PX", help="(the model's base resolution)")
    parser.add_argument("--width", type=positive, metavar="PX")
    parser.add_argument(
        "--solver-steps",
        type=positive,
        nargs="+",
        metavar="N",
        help="(28, or 4 leaps); of several, a strip for each image",
    )
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="images at once (%(default)s)")
    _solving_arguments(parser)
    parser.add_argument(
        "--true-cfg-scale",
        type=finite,
        default=1.0,
        help="for such a FLUX: guidance by a second run of the network, away from --negative-prompt (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    _weights_arguments(parser)


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `fmscale evaluate`."""
    parser.add_argument("source", metavar="RUN_OR_EXPORT", help="run directory, or exported pipeline folder")
    parser.add_argument(
        "--data", required=True, metavar="DATASET", help="indexed dataset that is held out, encoded as the run's"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for figures and plots")
    parser.add_argument(
        "--images",
        type=positive,
        default=1024,
        metavar="N",
        help="of each bucket its share (%(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        nargs="+",
        metavar="N",
        help="of the solver (1 2 4 8 28, or 1 2 4 8 to leap)",
    )
    parser.add_argument(
        "--inception",
        metavar="FILE",
        help="Inception v3 in .safetensors, that of FID or torchvision's: FID and more",
    )
    parser.add_argument(
        "--clip",
        metavar="MODEL",
        help="of open_clip, DIR or NAME=FILE.safetensors: CLIP score, FID and more",
    )
    _solving_arguments(parser)
    parser.add_argument("--seed", type=int, metavar="N", help="of the noise (that of the run)")
    parser.add_argument(
        "--trace-steps",
        type=positive,
        default=100,
        metavar="N",
        help="steps of the midpoint method, from which straightness and the error of few steps are known (%(default)s)",
    )
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="images at once (%(default)s)")
    _weights_arguments(parser)


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `fmscale export`."""
    parser.add_argument("run_dir", metavar="RUN", help="run directory")
    parser.add_argument("out", metavar="OUT", help="folder to make; must not exist")
    parser.add_argument(
        "--form",
        choices=("pipeline", "transformer", "single"),
        default="pipeline",
        help="pipeline: all that diffusers draws with; transformer: its folder of the network alone; single: one file "
        "under the names of Stability AI or Black Forest Labs, as ComfyUI loads it (%(default)s)",
    )
    parser.add_argument(
        "--with",
        dest="parts",
        choices=("vae", "text"),
        nargs="+",
        default=(),
        help="what goes into a single file beside the network: VAE, text encoders (nothing)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="of the transformer; VAE and text encoders stay in fp32 (%(default)s)",
    )
    parser.add_argument("--shard-gb", type=above_zero, metavar="GB", help="most that a file of a folder holds (10)")
    parser.add_argument("--license", type=licence, metavar="ID", help="for the model card, such as apache-2.0")
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload to this repository of the Hugging Face hub, with the token HF_TOKEN",
    )
    _weights_arguments(parser)


def import_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `fmscale import`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of diffusers, a pipeline's or a transformer's, its name on the Hugging Face hub, or a single "
        ".safetensors file",
    )
    parser.add_argument("out", metavar="RUN", help="run directory to make; must not exist")
    parser.add_argument(
        "--config", metavar="FILE", help="train config whose model, flow and conditioning these are, for a single file"
    )
    parser.add_argument("--vae", metavar="DIR", help="folder of the VAE, where SOURCE has none")
    parser.add_argument(
        "--text-encoder", action="append", default=[], metavar="ROLE=DIR", help="likewise; clip_l, clip_g or t5"
    )
    parser.add_argument("--t5-length", type=positive, metavar="N", help="tokens of T5 (that of the stock pipeline)")


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `fmscale demo`."""
    parser.add_argument("source", metavar="RUN_OR_EXPORT", help="run directory, or exported pipeline folder")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="another, or the same again, to be shown beside it")
    parser.add_argument("--port", type=port, default=7860, metavar="N", help="of this machine (%(default)s)")
    _frozen_arguments(parser)


def _solving_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--solver",
        metavar="NAME",
        help="euler, heun, midpoint, rk4, dpm, dopri5, stochastic, or leap for a model of few steps (euler or leap)",
    )
    parser.add_argument(
        "--guidance-scale",
        type=finite,
        default=5.0,
        help="1 is no guidance; a FLUX with guidance_embed is told it, and fmscale's training tells 1 (%(default)s)",
    )
    parser.add_argument(
        "--guidance-interval",
        type=finite,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="t at which there is guidance, 1 is noise (0 1)",
    )
    parser.add_argument(
        "--guidance-rescale",
        type=finite,
        default=0.0,
        metavar="R",
        help="how much of the contrast that guidance adds is taken back, 0 to 1 (%(default)s)",
    )


def _weights_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of a run (the newest)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--weights", choices=("ema", "raw"), help="of a run (ema)")
    weights.add_argument(
        "--ema-std", type=width, metavar="S", help="average over this relative width, made from a run's snapshots"
    )
    _frozen_arguments(parser)


def _frozen_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vae", metavar="DIR", help="AutoencoderKL folder, where it is no longer where encode found it"
    )
    parser.add_argument(
        "--text-encoder", action="append", default=[], metavar="ROLE=DIR", help="likewise, for clip_l, clip_g or t5"
    )
