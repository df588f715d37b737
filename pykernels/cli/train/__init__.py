"""`pykernels train`: models trained from the command line."""

from __future__ import annotations

import click

from ...testing.models import TASKS
from .._output import BadInput
from . import model, word2vec


class _Models(click.Group):
    """An unknown model is answered with the known ones."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise BadInput(f"no model {args[0]!r}; there are {', '.join(self.commands)}")
        return super().resolve_command(ctx, args)


@click.group("train", cls=_Models)
def command() -> None:
    """Train a model on a text.

    The same training twice gives the same bits: seed, text, threads and backend decide.
    """


command.add_command(word2vec.command)
for _name in TASKS:
    command.add_command(model.make(_name))
