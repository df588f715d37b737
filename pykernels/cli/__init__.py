"""The `pykernels` command: what is installed, is it right, is it fast, the demo, and training."""

from __future__ import annotations

import click

from .. import __version__
from . import bench, demo, info, train, verify


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="pykernels")
def main() -> None:
    """Fused kernels for PyTorch, each checked against a pure-torch reference.

    Results go to stdout, progress to stderr. Exit codes: 0 all is well, 1 a check failed, 2 bad input.
    """


for _module in (info, verify, bench, demo, train):
    main.add_command(_module.command)

__all__ = ["main"]
