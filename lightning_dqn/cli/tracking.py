"""Prepares loggers: files in the run's folder; W&B online only where it can be, with no prompt and no failed run."""

import netrc
import os
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from jsonargparse import Namespace
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


def prepare_logger(logger: Namespace, folder: Path, resumed: bool) -> str:
    """Put a logger's files into the run's folder, unless it was given another, and choose W&B's mode.

    Args:
        logger: class_path and init_args, changed in place.
        folder: of the run.
        resumed: whether an earlier run left its files there.

    Returns:
        Why W&B has to be offline; empty if it hasn't, or was told to be.
    """
    args = logger.init_args
    is_wandb = logger.class_path.endswith("WandbLogger")
    if args.get("save_dir") == ".":
        args.save_dir = str(folder)
        if not is_wandb:
            # no folders below the run's own, unless it goes on: then its old files stay as they are
            args.name, args.version = "", f"resumed_{datetime.now():%Y-%m-%d_%H-%M-%S}" if resumed else ""
    # of several ranks the first one tracks alone
    if not is_wandb or args.offline or args.mode or os.environ.get("WANDB_MODE") or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return ""
    reason = wandb_unavailable()
    if reason:
        args.mode = "offline"
    return reason


def continue_wandb(logger: Namespace) -> None:
    """Let W&B go on with the run whose files lie where the logger will put its own; offline too.

    Args:
        logger: class_path and init_args, changed in place.
    """
    args = logger.init_args
    if not logger.class_path.endswith("WandbLogger") or args.id or args.version:
        return
    # wandb names them (offline-)run-<date>_<time>-<id>
    earlier = sorted(Path(args.save_dir).glob("wandb/*run-*-*"), key=lambda path: path.stat().st_mtime)
    if earlier:
        args.id = earlier[-1].name.rpartition("-")[2]


def wandb_unavailable() -> str:
    """Why Weights & Biases can't be reached from here; empty if it can."""
    import requests  # noqa: PLC0415  with wandb half a second, which runs without W&B need not wait
    import wandb  # noqa: PLC0415

    base_url = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
    host = urlsplit(base_url).hostname or ""
    try:
        entries = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        entries = {}
    if not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or host in entries):
        return "no credentials are configured"
    try:
        status = requests.head(base_url, timeout=5).status_code
    except requests.RequestException as error:
        return f"{host} does not answer ({type(error).__name__})"
    return f"{host} answers with status {status}" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else ""


def start_wandb(logger: WandbLogger) -> str:
    """Begin the W&B run now, offline if the server refuses it.

    Returns:
        Why it is offline; empty if it isn't, or was told to be.
    """
    import wandb  # noqa: PLC0415

    # Lightning hands on an argument that wandb warns of whatever its value
    logger._wandb_init.pop("anonymous", None)
    if os.environ.get("WANDB_SWEEP_ID"):
        # its runs lie in its project, and wandb warns of any other
        logger._wandb_init.pop("project", None)
    if logger._wandb_init.get("mode") == "offline" or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return ""
    try:
        _ = logger.experiment
    except (wandb.errors.Error, OSError) as error:
        logger._wandb_init["mode"] = "offline"
        return " ".join(str(error).split())
    return ""
