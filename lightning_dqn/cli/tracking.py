"""Prepares loggers: sets their folder, and runs W&B offline if it is unavailable, without a prompt or an error."""

import netrc
import os
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from jsonargparse import Namespace
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_dqn._compat.lightning import wandb_init_args
from lightning_dqn._compat.wandb import latest_run_id


def prepare_logger(logger: Namespace, folder: Path, resumed: bool) -> str:
    """Set the folder of a logger to that of the run, unless it was given, and choose W&B's mode.

    Args:
        logger: class_path and init_args, changed in place.
        folder: folder of the run.
        resumed: whether the folder contains files of an earlier run.

    Returns:
        The reason why W&B must be offline; empty if it is online, or if offline was requested.
    """
    args = logger.init_args
    is_wandb = logger.class_path.endswith("WandbLogger")
    if args.get("save_dir") == ".":
        args.save_dir = str(folder)
        if not is_wandb:
            # no subfolders, unless the run resumes: then its old files are not overwritten
            args.name, args.version = "", f"resumed_{datetime.now():%Y-%m-%d_%H-%M-%S}" if resumed else ""
    # only rank 0 logs
    if not is_wandb or args.offline or args.mode or os.environ.get("WANDB_MODE") or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return ""
    reason = wandb_unavailable()
    if reason:
        args.mode = "offline"
    return reason


def continue_wandb(logger: Namespace) -> None:
    """Continue the W&B run whose files are in the logger's folder, online or offline.

    Args:
        logger: class_path and init_args, changed in place.
    """
    args = logger.init_args
    if not logger.class_path.endswith("WandbLogger") or args.id or args.version:
        return
    args.id = latest_run_id(args.save_dir)


def wandb_unavailable() -> str:
    """The reason why Weights & Biases is unavailable; empty if it is available."""
    import requests  # noqa: PLC0415  takes half a second with wandb
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
    """Start the W&B run, offline if the server rejects it.

    Returns:
        The reason why it is offline; empty if it is online, or if offline was requested.
    """
    import wandb  # noqa: PLC0415

    # Lightning passes an argument that wandb warns of for any value
    init_args = wandb_init_args(logger)
    init_args.pop("anonymous", None)
    if os.environ.get("WANDB_SWEEP_ID"):
        # runs of a sweep are in its project, and wandb warns of any other
        init_args.pop("project", None)
    if init_args.get("mode") == "offline" or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return ""
    try:
        _ = logger.experiment
    except (wandb.errors.Error, OSError) as error:
        init_args["mode"] = "offline"
        return " ".join(str(error).split())
    return ""
