"""The command line: each flag is a field of the settings, so flags, `SPLITSERVE_*` and help cannot drift apart.

Nothing heavy is imported here: `splitserve --help` answers at once, and the router never loads torch.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from splitserve.config import (
    MIB,
    Group,
    HttpSettings,
    RouterSettings,
    ServeProcessSettings,
    TopProcessSettings,
    WorkerProcessSettings,
)
from splitserve.errors import ConfigError, StartupError, row_of
from splitserve.telemetry.build import installed_version

PREFIX = "SPLITSERVE_"
METAVARS: dict[object, str] = {int: "N", float: "X"}
EPILOG = """\
examples:
  splitserve serve                                    SmolLM2-135M-Instruct, one prefill and one decode worker
  splitserve serve Qwen/Qwen3-0.6B --prefill 2 --decode 2
  splitserve decode --nats @FILE                      one more worker for a running cluster
Each flag can be given as an environment variable: --max-num-seqs is SPLITSERVE_MAX_NUM_SEQS. A flag wins.
"""


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: `service` is a module with a coroutine `run(settings, signals)`."""

    name: str
    help: str
    settings: type[Any]  # a dataclass of groups
    service: str
    hidden: frozenset[str] = frozenset()  # fields that mean nothing here
    positional: str = ""  # the field that may also be given without its flag


COMMANDS = (
    Command(
        "serve",
        "start everything on this machine: NATS, Redis, workers, router",
        ServeProcessSettings,
        "splitserve.serve.service",
        frozenset({"name", "metrics_port", "kv_port", "kv_socket_dir"}),
        positional="model",
    ),
    Command(
        "router",
        "the OpenAI API and the brain of a cluster",
        RouterSettings,
        "splitserve.router.service",
    ),
    Command("prefill", "a worker that reads prompts", WorkerProcessSettings, "splitserve.prefill.service"),
    Command("decode", "a worker that writes answers", WorkerProcessSettings, "splitserve.decode.service"),
    Command(
        "top",
        "workers, load and requests of a running router, live",
        TopProcessSettings,
        "splitserve.top.service",
        frozenset(HttpSettings.model_fields) - {"api_key"},
        positional="url",
    ),
)


class Parser(argparse.ArgumentParser):
    """Argparse whose errors are one line and an exit code, as everybody else's."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help says more)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand to its end and give the exit code."""
    try:
        command, settings = parse(sys.argv[1:] if arguments is None else arguments, os.environ)
    except StartupError as error:
        print(f"splitserve: {error.message}", file=sys.stderr)
        return row_of(error).exit_code
    from splitserve.runtime.process import run_process  # late: --help needs none of it

    service = _imported(command.service)
    return run_process(lambda signals: service.run(settings, signals))


def _imported(name: str) -> ModuleType:
    """A module, of whose imports nothing is ever looked through for garbage: it would be a fifth of a worker's imports, and
    half a second at some step later on."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[Command, Any]:
    """The subcommand and its settings, from flags, then the environment, then defaults.

    Raises ConfigError naming the flag (and the variable, when the value came from it). `--help` and `--version` exit.
    """
    namespace, unknown = _parser().parse_known_args(arguments)
    given = vars(namespace)
    command: Command = given.pop("command")
    if unknown:
        raise ConfigError(_unknown(unknown[0], command))
    name = command.positional
    alone = given.pop(name.upper(), None)
    if alone is not None and given.setdefault(name, alone) != alone:
        raise ConfigError(f"two {name}s: {alone} and {_flag(name)} {given[name]}; give one")
    groups = {name: _read(group, given, environ) for name, group in _groups(command).items()}
    return command, command.settings(**groups)


def _unknown(argument: str, command: Command) -> str:
    if not argument.startswith("-"):
        return f"{argument!r} is one argument too many for splitserve {command.name}"
    flags = [_flag(name) for group in _groups(command).values() for name in group.model_fields]
    near = difflib.get_close_matches(argument.partition("=")[0], flags, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"splitserve {command.name} has no flag {argument}{hint} (splitserve {command.name} --help lists all)"


def _groups(command: Command) -> dict[str, type[Group]]:
    hints = get_type_hints(command.settings)
    return {field.name: hints[field.name] for field in fields(command.settings)}


def _read(group: type[Group], given: Mapping[str, str], environ: Mapping[str, str]) -> Group:
    try:
        return group(**{name: given[name] for name in group.model_fields if name in given})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        variable = PREFIX + name.upper()
        source = _flag(name) if name in given else variable
        value = given.get(name, environ.get(variable))
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{source} {value!r}: {reason[:1].lower()}{reason[1:]}") from error


def _parser() -> Parser:
    parser = Parser(
        prog="splitserve",
        description="LLM serving split by phase: prefill workers, decode workers and an OpenAI router.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"splitserve {installed_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        one = commands.add_parser(
            command.name,
            help=command.help,
            usage=f"splitserve {command.name} {f'[{command.positional.upper()}] ' if command.positional else ''}[FLAGS]",
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog="Each flag can be given as SPLITSERVE_<FLAG> in the environment; a flag wins.",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        one.set_defaults(command=command)
        if command.positional:
            one.add_argument(command.positional.upper(), nargs="?", help=f"the same as {_flag(command.positional)}")
        for group in _groups(command).values():
            section = one.add_argument_group((group.__doc__ or group.__name__).splitlines()[0].rstrip("."))
            for name, field in group.model_fields.items():
                if name not in command.hidden:
                    _add_flag(section.add_argument, name, field)
    return parser


def _add_flag(add: Callable[..., object], name: str, field: FieldInfo) -> None:
    text = (field.description or "").replace("%", "%%") + _default(name, field.default)
    if field.annotation is bool:
        add(_flag(name), action=argparse.BooleanOptionalAction, help=text)
    elif get_origin(field.annotation) is Literal:
        add(_flag(name), choices=get_args(field.annotation), help=text)
    elif name.endswith("_bytes"):
        add(_flag(name), metavar="SIZE", help=text)
    else:
        add(_flag(name), metavar=METAVARS.get(field.annotation, "TEXT"), help=text)


def _default(name: str, value: object) -> str:
    if value == "":
        return ""
    if name.endswith("_bytes") and isinstance(value, int) and value:
        return f" (default: {value // MIB}MiB)"
    return f" (default: {str(value).lower()})"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
