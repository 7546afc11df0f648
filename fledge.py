"""The `fledge` command: build the parser from the packages' subcommands, and run one of them."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn

TRAIN_EXTRA: Final = (
    *("matplotlib", "onnx", "onnxscript", "safetensors", "scipy", "tensorboardX", "tomli_w"),
    *("torch", "torchvision"),
)
"""Top-level modules of the packages that the extra `fledge[train]` installs."""


class _VerbParser(argparse.ArgumentParser):
    """The parser of a subcommand: overrides (`key=value`) may stand anywhere among its options.

    argparse calls `parse_known_args` for a subcommand. This method treats RECIPE as absent in
    `--data DIR RECIPE`, and a=1 as unknown in `RECIPE --data DIR a=1`. Parsing the options first
    and the positional arguments afterwards avoids both errors.
    """

    _parsing = False
    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = args or self._words
        # Python 3.11 to 3.13 call this method again for the options and for the positionals.
        if self._parsing or all(action.dest != "overrides" for action in self._actions):
            return super().parse_known_args(args, namespace)
        self._parsing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._parsing = False

    def error(self, message: str) -> NoReturn:
        """Exit with a message of one line; argparse prints the usage, too."""
        from serving.cli_hints import without_bundle
        from serving.terminal import escape

        text = message.removeprefix("argument ")
        verb = self.prog.rpartition(" ")[2]
        hint = without_bundle(verb, [verb, *self._words]) if "required" in text else ""
        hint = hint or f"; `{self.prog} --help` describes it"
        self.exit(2, f"{escape(f'fledge: {text}{hint}')}\n")


def _parser() -> argparse.ArgumentParser:
    from serving import __version__  # not at the top: see `main`
    from serving import cli as serving_cli

    parser = _VerbParser(
        prog="fledge",
        description="Fine-tune an image classifier, export it proven equal, serve it over HTTP.",
        epilog="to start: fledge train demo --data sample; "
        "fledge export runs/latest --out bundle; fledge serve bundle",
    )
    parser.add_argument("--version", action="version", version=f"fledge {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_VerbParser)

    def add_verb(
        function: Callable[[argparse.Namespace], None], example: str
    ) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").splitlines()[0]
        name = function.__name__.replace("_", "-")
        added = verbs.add_parser(name, help=text, description=text, epilog=f"example: {example}")
        added.set_defaults(verb=function, verb_name=name)
        added.add_argument("--debug", action="store_true", help="show tracebacks")
        return added

    with suppress(ModuleNotFoundError):  # an image that only serves has no training/
        from training.cli import data, runs, train

        train.add_to(add_verb)
        data.add_to(add_verb)
        runs.add_to(add_verb)
    with suppress(ModuleNotFoundError):  # nor export/
        from export import cli as export_cli

        export_cli.add_to(add_verb)
    serving_cli.add_to(add_verb)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status.

    The status is 0 if the command succeeded, 1 if the work failed or did not pass a gate, 2 if an
    option or the data can't be used, 78 without a usable bundle, and 130 after an interrupt.
    """
    # Not at the top, because `bentoml serve fledge:latest` looks for a module of this name before
    # it looks for a Bento. It would import this file, and then the `serving` imported here would be
    # used instead of the Bento's own.
    from serving import cli_hints
    from serving.errors import FledgeError, OptionError
    from serving.terminal import escape

    # OpenMP threads that spin while they wait take a core from other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words, parser = list(sys.argv[1:] if arguments is None else arguments), _parser()
    options = argparse.Namespace(debug=False)
    try:
        verbs = cli_hints.known_verbs(parser)
        if verbs:
            cli_hints.check_command(words, verbs)
        options, unknown = parser.parse_known_args(words)
        unknown += [word for word in getattr(options, "overrides", ()) if "=" not in word]
        if unknown:
            verb = options.verb_name
            hint = cli_hints.for_spaces(words)
            hint = hint or cli_hints.for_option(
                unknown[0], verb, cli_hints.options_of(verbs[verb]), words
            )
            if not hint and hasattr(options, "suggest"):
                hint = options.suggest(unknown[0], options, words)
            raise OptionError(f"{unknown[0]!r} is no option of fledge {verb}{hint}")
        options.verb(options)
    except FledgeError as error:
        if options.debug:
            traceback.print_exc()
        hint = cli_hints.for_spaces(words) if error.exit_status == 2 else ""
        print(f"fledge: {error}{'' if hint in str(error) else hint}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("fledge: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if options.debug or (error.name or "").partition(".")[0] not in TRAIN_EXTRA:
            raise
        print(
            f"fledge: {error.name} is not installed; training and export need the extra `train`: "
            "in the folder of Fledge, pip install '.[train]'",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        if options.debug:
            raise
        place = f" {error.filename}:" if error.filename else ""
        print(escape(f"fledge:{place} {error.strerror or error}"), file=sys.stderr)
        return 1
    return 0


def program() -> None:
    """Run `main` as a process of its own and exit with its status."""
    # Imports create several hundred thousand objects that stay. With the default threshold of 700
    # the garbage collector searches these objects so often that training starts a sixth slower.
    gc.set_threshold(10_000)
    from serving.errors import FledgeError
    from serving.utils import process

    try:
        process.prepare()
    except FledgeError as error:
        print(f"fledge: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    try:
        status = main()
    except SystemExit as ended:  # by argparse: --help, or a wrong option
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    if "torch" in sys.modules or not _is_flushed():
        from serving.utils.process import exit_process

        exit_process(status)  # tearing down torch in Python takes a second, which this skips
    sys.exit(status)


def _is_flushed() -> bool:
    try:
        sys.stdout.flush()
    except OSError:  # for example a full disk, of which `exit_process` tells
        return False
    return True


if __name__ == "__main__":
    program()
