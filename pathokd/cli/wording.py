"""What jsonargparse says of a wrong command line or recipe, as one sentence."""

import argparse
import difflib
import re
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

_KEY = re.compile(r'Parser key "(.+?)":?\s*(.*)')
_NOT_SAID = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Given value|Problem with given class_path"
    r"|Expected a <class 'NoneType'>"
)
"""How jsonargparse arrived at what is wrong, and that nothing would have been right as well."""
_EXPECTED = (
    (re.compile(r"Expected an? <class '(?:\w+\.)*(\w+)'>\. Got value: (.*)"), r"expected \1, got \2"),
    (re.compile(r"Expected an? typing\.Literal\[(.+?)\]\. Got value: (.*)"), r"expected one of \1, got \2"),
    (re.compile(r"Expected an? typing\.Literal\[(.+?)\]$"), r"expected one of \1{given}"),
    (re.compile(r"Option '(.+?)' is not accepted"), r"'\1' is not an option"),
)


class OneSentence(ArgumentParser):
    """A parser that answers a wrong argument with a sentence instead of all its options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and leave with 2; parsers within parsers raise, as jsonargparse wants of them."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        name = parser.prog.replace(" [options]", "")
        said = sentence(message).rstrip(".")
        options = parser._option_string_actions
        if f"--{said.partition(':')[0]}" in options:
            said = f"--{said}"
        what, colon, names = said.partition(" required: ")
        if colon:
            said = what + colon + ", ".join(f"--{n}" if f"--{n}" in options else n for n in names.split(", "))
        text = f"{said}{_meant(parser, message)}; {name} --help explains the options."
        print(f"{name}: {self.typed(text)}", file=sys.stderr)
        sys.exit(2)

    def typed(self, text: str) -> str:
        """Text with options as the user types them."""
        return text


def sentence(text: str) -> str:
    """A message of jsonargparse without its tree of attempts: the key, and each different thing that is wrong with it.

    A value that may be of several types is refused once by each, often in the same words. What torch tells of an error
    in a process that reads tiles is the error again, without the traceback; other text stays as it is.
    """
    if told := re.match(r"Caught (\w+) in DataLoader worker process", text):
        text = re.split(rf"^(?:\w+\.)*{told[1]}: ", text, flags=re.MULTILINE)[-1]
    if not re.search(r'Parser key "|Does not validate against any of the Union subtypes', text):
        return text.strip()
    given = re.search(r"^ *Given value: (.*)$", text, re.MULTILINE)
    keys: list[str] = []
    wrong: list[str] = []
    for line in text.splitlines():
        said = re.sub(r"^[\s-]*", "", line).rstrip()
        found = _KEY.match(said)
        if found and found[1] not in keys and not wrong:
            keys.append(found[1])
        said = found[2] if found else said
        for pattern, words in _EXPECTED:
            said = pattern.sub(words, said)
        said = said.replace("{given}", f", got {given[1]}" if given else "")
        if said and said not in wrong and not _NOT_SAID.match(said):
            wrong.append(said)
    if len(wrong) > 1:  # any string may be the path of a YAML file, which is seldom what was meant
        wrong = [each for each in wrong if not each.startswith("Expected a path but")]
    return ": ".join(filter(None, (".".join(keys), "; or ".join(wrong))))


def _meant(parser: Any, message: str) -> str:
    """Options that look like one that there is not."""
    found = re.match(r"unrecognized arguments: --([\w.-]+)", message)
    shown = (action.option_strings for action in parser._actions if action.help != argparse.SUPPRESS)
    options = [option[2:] for each in shown for option in each if not option.endswith("+")]
    near = difflib.get_close_matches(found[1].replace("-", "_"), options, n=2) if found else []
    return f" (did you mean --{' or --'.join(near)}?)" if near else ""
