"""`pathokd VERB ...`: finds the verb, imports only what it needs, and turns errors into one sentence."""

import importlib
import inspect
import os
import re
import sys
import typing
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pathokd._version import __version__
from pathokd.cli.wording import OneSentence, sentence
from pathokd.errors import PathokdError

VERBS: dict[str, str] = {
    "quickstart": "See the whole chain on the slides that come with pathokd, in minutes",
    "inspect": "Say what a slide is: levels, microns per pixel and their source, profile, warnings",
    "tile": "Find tissue on slides and write the table of tiles",
    "pack": "Read the tiles of a table and store them in shards for fast training",
    "simulate": "Show tiles or slides as other laboratories and scanners would",
    "stain-stats": "Measure how a cohort is stained, for RandStainNA",
    "phantom": "Make slides of procedural H&E with ground truth, in several stainings and scanners",
    "prototypes": "Cluster a teacher's tokens into the head that DINO and iBOT need",
    "denoise": "Find what stain and scanner do to a teacher's tokens, to keep it out of its targets",
    "cache": "Run a teacher over tiles once and store its targets, for any number of trainings",
    "fit": "Distil a teacher into a student, as a YAML file says",
    "validate": "Measure a checkpoint on the held-out tiles",
    "test": "The same, logged as test",
    "export": "Turn a run into a folder that timm loads, or embeddings into files that other tools read",
    "embed": "Write one HDF5 of features per slide",
    "verify": "Check that a folder of features is complete and sound",
    "overlay": "Draw each slide with its tiles, beside a picture of what the model takes for alike",
    "doctor": "Say what this machine can read and run, and which weights it has",
    "robustness": "Measure models on registered tiles of several scanners and stainings",
    "compare": "Compare models: quality, robustness to scanner and stain, cost",
}
_TRAINING = ("fit", "validate", "test")
_OWN_FILES = ("cache", "compare", "quickstart", "robustness", "export", "overlay", "prototypes", "denoise")


def usage() -> str:
    """The text of `pathokd --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: pathokd VERB [options]      (pathokd VERB --help explains one;",
            "                                    pathokd --debug VERB shows where an error comes from)",
            "",
            *lines,
            "",
            f"version {__version__}",
        ]
    )


def main(args: list[str]) -> int:
    """Run one command line.

    Args:
        args: what follows `pathokd`.

    Returns:
        The exit code: 0, 1 if some of the work failed, 2 if the command line is wrong.
    """
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    debug = args[0] == "--debug"
    if debug:
        args = args[1:] or ["--help"]
    verb, rest = args[0], args[1:]
    if verb == "--version":
        print(f"pathokd {__version__}")
        return 0
    if verb not in VERBS:
        print(f"pathokd: {verb!r} is no verb; choose from {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    try:
        if verb in _TRAINING:
            train: Callable[..., Any] = importlib.import_module("pathokd.cli.train").train
            train(verb, rest)
            return 0
        return _run_verb(verb, rest)
    except (PathokdError, ValueError, OSError) as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        print(f"pathokd {verb}: {_sentence(error)}", file=sys.stderr)
        return 1


def _sentence(error: BaseException) -> str:
    return sentence(str(error)) or type(error).__name__


def _run_verb(verb: str, args: list[str]) -> int:
    module = importlib.import_module(f"pathokd.cli.{verb if verb in _OWN_FILES else 'verbs'}")
    function: Callable[..., int] = getattr(module, verb.replace("-", "_"))
    parser = VerbParser(prog=f"pathokd {verb}", description=VERBS[verb] + ".")
    several = [name for name, kind in typing.get_type_hints(function).items() if kind == list[str]]
    positional = [
        name for name in several if inspect.signature(function).parameters[name].default is inspect.Parameter.empty
    ]
    skip: set[str | int] = {*positional}
    parser.add_function_arguments(function, as_positional=True, skip=skip)
    for name in positional:  # jsonargparse would want [a,b] for a list; a shell gives a b
        parser.add_argument(name, nargs="+", type=str, help=_argument_help(function, name))
    parsed = vars(parser.instantiate_classes(parser.parse_args(_dashed(args, function))))
    for name, value in parsed.items():
        if value == "" or (isinstance(value, list) and "" in value):  # as a path it would be the folder one stands in
            typed = parser.typed(f"--{name}" if f"--{name}" in parser._option_string_actions else name)
            raise ValueError(f"{typed} is empty, as an unset variable of the shell is: give it a value.")
    return function(**parsed)


class VerbParser(OneSentence):
    """Shows options as they are typed: `--tile-px`, and flags without a value."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Help text with dashes."""
        text = self.typed(super().format_help(*args, **kwargs))
        return text.replace(" {true,false}", "").replace("bool, default", "flag, default")

    def typed(self, text: str) -> str:
        """Dashes instead of underscores in options."""
        return re.sub(r"--[a-z][a-z0-9_]*", lambda match: match.group().replace("_", "-"), text)


def _argument_help(function: Callable[..., Any], name: str) -> str:
    found = re.search(rf"^ +{name}: (.*)$", function.__doc__ or "", re.MULTILINE)
    return found.group(1) if found else ""


def _dashed(args: list[str], function: Callable[..., Any]) -> list[str]:
    """`--tile-px 2 --overwrite --stain a,b` as jsonargparse takes it: `--tile_px 2 --overwrite=true --stain=[a,b]`."""
    kinds = typing.get_type_hints(function)
    out: list[str] = []
    rest = deque(args)
    while rest:
        option, equals, value = rest.popleft().partition("=")
        if option.startswith("--") and len(option) > 2:
            option = option.replace("-", "_").replace("__", "--", 1)
            kind = kinds.get(option[2:])
            if kind is bool and not equals:
                equals, value = "=", rest.popleft() if rest and rest[0] in ("true", "false") else "true"
            elif typing.get_origin(kind) in (list, tuple):
                value = value if equals or not rest else rest.popleft()
                equals, value = "=", value if value.startswith("[") else f"[{value}]"
        out.append(option + equals + value)
    return out


def plain_warnings() -> None:
    """Show pathokd's own warnings as the sentences they are, without the line of code that they come from."""
    default, own = warnings.formatwarning, Path(__file__).parents[1]

    def shown(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        ours = category is UserWarning and Path(filename).is_relative_to(own)
        return f"pathokd: {message}\n" if ours else default(message, category, filename, lineno, line)

    warnings.formatwarning = shown


def entry() -> None:
    """Console script."""
    plain_warnings()
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # `pathokd ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("\npathokd: stopped; the same command goes on where it can.", file=sys.stderr)
        sys.exit(130)
