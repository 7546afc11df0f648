"""The part of a network that trains, compiled by torch.compile where the recipe asks for it.

What is compiled is a function of its own around the layers: the classifier, its weights and their
names stay as they are.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from typing import Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from serving.errors import OptionError
from training.model import Classifier
from training.options import Recipe, Stage

REMEDY: Final = "use compile = false"


class Compiled(nn.Module):
    """A network that runs compiled on batches as large as the first one it sees.

    The odd batch that ends an epoch runs as it always did: a second compiling would cost more time
    than one batch an epoch can win back. Its parameters are the network's own.
    """

    def __init__(self, network: nn.Module, *, cuda_graphs: bool = False) -> None:
        """Nothing is compiled before the first batch."""
        super().__init__()
        self.network, self._size, self._graphs = network, 0, cuda_graphs

        def run(inputs: Tensor) -> Tensor:
            outputs: Tensor = network(inputs)
            return outputs

        self._fast: Callable[[Tensor], Tensor] = torch.compile(
            run, dynamic=False, mode="reduce-overhead" if cuda_graphs else None
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """As the network.

        Raises:
            OptionError: It can't be compiled; names the option.
        """
        self._size = self._size or len(inputs)
        if len(inputs) != self._size:
            outputs: Tensor = self.network(inputs)
            return outputs
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            return self._fast(inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise OptionError(f"compile: {_why(error)}; {REMEDY}") from error


_made: WeakKeyDictionary[Classifier, tuple[str, Compiled]] = WeakKeyDictionary()
"""What is compiled of each classifier, and for which stage."""


def suffix_of(classifier: Classifier, stage: Stage, recipe: Recipe) -> nn.Module:
    """The classifier's suffix, compiled if the recipe says so: the same one for a whole stage."""
    if not recipe.compile:
        return classifier.suffix
    name, compiled = _made.get(classifier, ("", None))
    if compiled is None or name != stage.name:
        torch.compiler.reset()  # what was compiled for the stage before takes memory, too
        compiled = Compiled(classifier.suffix, cuda_graphs=recipe.compile == "cuda_graphs")
        _made[classifier] = stage.name, compiled
    return compiled


def check(recipe: Recipe, where: torch.device) -> None:
    """Find before any work what would stop it: something small is compiled for a try.

    Raises:
        OptionError: It can't be compiled here; names the option.
    """
    if recipe.compile == "cuda_graphs" and where.type != "cuda":
        raise OptionError("compile = 'cuda_graphs' needs a GPU; use compile = true or false")
    if recipe.compile == "cuda_graphs" and recipe.optimizer.accumulate > 1:
        raise OptionError(
            "compile = 'cuda_graphs' overwrites gradients that optimizer.accumulate = "
            f"{recipe.optimizer.accumulate} would add up; use compile = true, or accumulate = 1"
        )
    if not recipe.compile:
        return
    if where.type == "cpu" and not _has_compiler():
        raise OptionError(f"compile: there is no C++ compiler here; install g++, or {REMEDY}")
    inputs = torch.ones(8, 8, device=where, requires_grad=True)
    try:
        torch.compile(lambda x: (x.sigmoid() * x).sum(), dynamic=False)(inputs).backward()
    except Exception as error:  # of whatever tool it is that does not work here
        raise OptionError(f"compile: {_why(error)}; {REMEDY}") from error


def _has_compiler() -> bool:
    """Whether the C++ compiler is there that torch would call."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which((os.environ.get("CXX") or usual).split()[0]) is not None


def _why(error: BaseException) -> str:
    """The first line of an error, or its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"torch can't compile here: {lines[0] if lines else type(error).__name__}".rstrip(".:")
