"""Say what to write instead of a command or an option that `fledge` does not have."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from serving.errors import OptionError
from serving.terminal import quote

_VERBS: Final[dict[str, str]] = {
    **dict.fromkeys(("fit", "finetune", "fine-tune", "learn", "training"), "train"),
    "resume": "train --resume",
    **dict.fromkeys(("predict", "infer", "inference", "classify", "label", "batch"), "score"),
    **dict.fromkeys(("test", "val", "validate", "eval"), "evaluate"),
    **dict.fromkeys(("deploy", "run", "start", "up", "server", "api"), "serve"),
    **dict.fromkeys(("convert", "bundle", "build", "package"), "export"),
    **dict.fromkeys(("info", "describe", "show"), "inspect"),
    "check": "verify",
    **dict.fromkeys(("find-lr", "lrfind", "lr-finder", "tune"), "lr-find"),
    **dict.fromkeys(("models", "archs", "networks", "arch"), "layers"),
    **dict.fromkeys(("view", "look", "data", "dataset"), "preview"),
    "clean": "cache --clear",
    **dict.fromkeys(("version", "-v", "-V", "-version"), "--version"),
    **dict.fromkeys(("help", "-help", "-?", "--usage"), "--help"),
}
"""Word of other tools, or habit -> the command."""

_OPTIONS: Final[dict[str, str]] = {
    **dict.fromkeys(
        ("--output", "--output-dir", "--outdir", "--save-dir", "--dest", "-o"), "--out"
    ),
    **dict.fromkeys(("--model", "--checkpoint", "--weights", "-m"), "--bundle"),
    **dict.fromkeys(("--bind", "--listen", "--address", "--ip", "--hostname", "-H"), "--host"),
    "-p": "--port",
    **dict.fromkeys(("--batch-size", "--bs", "-b"), "--batch"),
    **dict.fromkeys(("--threads", "--num-workers", "--jobs", "-j"), "--workers"),
    **dict.fromkeys(("--topk", "-k"), "--top-k"),
    **dict.fromkeys(("--gpu", "--gpus"), "--device"),
    **dict.fromkeys(("--dataset", "--data-dir", "--folder", "--dir", "--photos"), "--data"),
    "--views": "--tta",
}
"""Option of other tools -> the option here, for the commands that have it."""

_ARGUMENTS: Final[dict[str, str]] = {
    "evaluate": "--data",
    "report": "--data",
    "export": "--out",
    "evaluate-scores": "--labels",
}
"""Command -> the option that is meant by one argument too many."""

_MOST_SPACES: Final = 8  # words of a path that are joined

_OF_A_BUNDLE: Final = ("serve", "inspect", "verify")
"""Commands with the bundle as an argument, without an option."""

_LONGEST: Final = 200  # characters of a command that is written out


def check_command(words: Sequence[str], verbs: Collection[str]) -> None:
    """Check that the first word of a command line is a command, `--help` or `--version`.

    Raises:
        OptionError: It is not; the message has the nearest command line.
    """
    if not words:
        raise OptionError(f"name a command: {', '.join(verbs)}; fledge --help describes them")
    word, rest = words[0], words[1:]
    general = ("--help", "--version", "-h")
    if word in verbs or any(
        one.startswith(word) for one in general if len(word) > 2 or one == word
    ):
        return
    near = difflib.get_close_matches(word.replace("_", "-"), [*verbs, *general], n=1)
    instead = _VERBS.get(word) or (near[0] if near else "")
    what = "option" if word.startswith("-") else "command"
    if instead.partition(" ")[0] not in (*verbs, *general):
        after = "; options come after the command" if what == "option" else ""
        raise OptionError(f"{word!r} is no {what} of fledge{after}; use {', '.join(verbs)}")
    command = f"fledge {instead} {' '.join(map(quote, rest))}".strip()
    command = command if len(command) <= _LONGEST else f"fledge {instead} …"
    raise OptionError(f"{word!r} is no {what} of fledge; did you mean `{command}`?")


def for_option(word: str, verb: str, known: Collection[str], words: Sequence[str]) -> str:
    """Return "; did you mean `--out bundle`?" for an option that a command does not have, or "".

    Args:
        word: The unknown option, such as "--output" or "--output=bundle", or an argument too many.
        verb: The command.
        known: The options of the command.
        words: The command line.
    """
    if not word.startswith("-"):
        option = "--port" if verb == "serve" and word.isdecimal() else _ARGUMENTS.get(verb)
        return f"; did you mean `{option} {quote(word)}`?" if option else ""
    name, _, _ = word.partition("=")
    instead = _OPTIONS.get(name, "")
    if name == "--bundle" and verb in _OF_A_BUNDLE:
        return without_bundle(verb, words)
    if instead not in known:
        near = difflib.get_close_matches(name.replace("_", "-"), known, n=1, cutoff=0.8)
        instead = near[0] if near else ""
    if not instead:
        return ""
    value = value_of(word, words)
    return f"; did you mean `{f'{instead} {quote(value)}' if value else instead}`?"


def for_spaces(words: Sequence[str]) -> str:
    """Return "; did you mean '/a/my photos', in quotes?" for a path that lost its quotes, or "".

    That is where words that follow each other, joined by spaces, are the path of something.

    Args:
        words: The command line.
    """
    for start, first in enumerate(words):
        path = first.partition("=")[2] if first.startswith("--") else first
        if not path or path.startswith("-"):
            continue
        for word in words[start + 1 : start + _MOST_SPACES]:
            if word.startswith("-"):
                break
            path += f" {word}"
            if os.path.exists(os.path.expanduser(path)):
                return f"; did you mean {quote(path)}, in quotes?"
    return ""


def without_bundle(verb: str, words: Sequence[str]) -> str:
    """Return "; did you mean `fledge serve bundle`?" for `fledge serve --bundle bundle`, or ""."""
    at = next((at for at, word in enumerate(words) if word.partition("=")[0] == "--bundle"), None)
    if at is None or verb not in _OF_A_BUNDLE:
        return ""
    bundle = value_of(words[at], words)
    before, after = list(words[1:at]), list(words[at + (1 if "=" in words[at] else 2) :])
    if not bundle or any(not word.startswith("-") for word in before[:1]):
        return ""
    return f"; did you mean `{' '.join(['fledge', verb, *map(quote, [bundle, *before, *after])])}`?"


def value_of(word: str, words: Sequence[str]) -> str:
    """Return the value of an option on the command line, or "": of `--a=b` and of `--a b`."""
    _, equals, value = word.partition("=")
    if equals or word not in words:
        return value
    after = list(words)[list(words).index(word) + 1 :][:1]
    return after[0] if after and not after[0].startswith("-") else ""


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return the long options of a command."""
    return [one for one in parser._option_string_actions if one.startswith("--")]


def known_verbs(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}
