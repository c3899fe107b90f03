"""TorchRec, fbgemm and torch tell their own developers a page per start-up; a user of training need not read it."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Their warnings and notes are left out, their errors are not. Called by entry points, never on import."""
    for name in ("torchrec", "fbgemm_gpu", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_not_fbgemm)  # fbgemm logs its kernels' arguments to the root logger
    for module in ("torchrec", "fbgemm_gpu", "torch"):
        warnings.filterwarnings("ignore", module=module)
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)


def _not_fbgemm(record: logging.LogRecord) -> bool:
    return not (record.name == "root" and record.levelno < logging.WARNING)
