"""What our command lines make of arguments; nothing is run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch.distributed.run
from typer.main import get_command

from isthmus import app


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """`isthmus ARGUMENTS…`, by name. Raises what ends the program with exit code 2."""
    command: Any = get_command(app)
    left = list(arguments)
    while hasattr(command, "commands"):
        command = command.commands[left.pop(0)]
    parameters: dict[str, Any] = command.make_context("isthmus", left).params
    return parameters


def parse_torchrun(arguments: Sequence[str]) -> Namespace:
    """`torchrun ARGUMENTS…`; `training_script` and `training_script_args` are what it starts."""
    return torch.distributed.run.get_args_parser().parse_args(list(arguments))
