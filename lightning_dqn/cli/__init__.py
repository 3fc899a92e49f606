"""The command line: `python -m lightning_dqn fit | validate | test | predict`."""

from lightning_dqn.cli.command import DQNCLI as DQNCLI
from lightning_dqn.cli.command import main as main
