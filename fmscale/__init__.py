"""Rectified-flow training of text-conditioned MMDiT models, from one laptop core to a Slurm cluster."""

__version__ = "0.1.0"
