"""A run on Weights & Biases: one a run folder, however often the run is started, and one a trial of a sweep.

Offline, each start writes a folder of its own, `<run>/wandb/offline-run-*`, all of one run, which
`wandb sync <run>/wandb/offline-run-*` puts together in the order of their starts (wandb before 0.31 wants --append).
"""

from __future__ import annotations

import netrc
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger

from nar_t2i.errors import UserError

ID_FILE = "wandb_id"  # in a run's folder
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass
class WandbConfig:
    """The `wandb` key of a recipe. Where it is null, its default, nothing is logged there but by the trials of a sweep.

    project, entity, group, name, tags: as `wandb.init` has them; name: default, the run folder's.
    mode: "online", "offline", or "auto": online where an API key is at hand. WANDB_MODE in the environment wins.
    """

    project: str = "nar-t2i"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: Literal["auto", "online", "offline"] = "auto"


def trial() -> tuple[str, str] | None:
    """(sweep, run), where a sweep's agent started this process."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return (sweep, run) if sweep and run else None


def logger(run_dir: Path, config: WandbConfig | None, continued: bool) -> WandbLogger | None:
    """The logger of the run in `run_dir`, or None where nothing is to be logged.

    continued: whether the folder's run goes on; one that starts anew is another run. `RunFolder` notes the first
    rank's id in the folder.
    """
    if config is None:
        if trial() is None:
            return None
        config = WandbConfig()
    mode = os.environ.get("WANDB_MODE") or (config.mode if config.mode != "auto" else "online" if _has_key() else "offline")
    if mode == "disabled":
        return None
    if mode not in ("online", "offline"):
        raise UserError(f"WANDB_MODE: must be online, offline or disabled, not {mode!r}")
    if mode == "online" and not _has_key():
        raise UserError("wandb.mode: online needs an API key: wandb login, or WANDB_API_KEY; offline needs none")
    made = WandbLogger(
        name=config.name or run_dir.name,
        id=_run_id(run_dir, continued),
        save_dir=run_dir,
        mode=mode,  # Lightning's `offline` sets an environment variable, which may be too late
        project=os.environ.get("WANDB_PROJECT", config.project),
        **{key: value for key in ("entity", "group", "tags") if (value := getattr(config, key))},
    )
    for key in ("anonymous", *(("id", "project") if trial() is not None else ())):
        del made._wandb_init[key]  # which W&B warns of; a trial's come from its agent
    return made


def finish(loggers: list[Logger], status: int, preempted: bool = False) -> None:
    """End the run on W&B with an exit status of the process. preempted: a sweep is to hand it out again."""
    for known in loggers:
        if isinstance(known, WandbLogger) and known._experiment is not None:
            if preempted:
                known.experiment.mark_preempting()
            known.experiment.finish(exit_code=status)


def _has_key() -> bool:
    """Whether `wandb` would find an API key."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run_dir: Path, continued: bool) -> str:
    path = run_dir / ID_FILE
    if trial() is None and continued and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    return os.environ.get("WANDB_RUN_ID") or "".join(secrets.choice(_LETTERS) for _ in range(8))
