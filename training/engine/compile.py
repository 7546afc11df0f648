"""The part of a network that trains, run a faster way where the recipe asks for it.

`torch.compile` (Ansel et al., 2024, "PyTorch 2") makes kernels of its own. A CUDA graph (Nguyen et
al., 2021, "Accelerating PyTorch with CUDA Graphs") has the kernels as they are, recorded once and
launched as one, for GPUs that wait for the program. Either is a function around the layers: the
classifier, its weights and their names stay as they are.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable
from typing import Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from serving.errors import OptionError
from training.config.schema import Recipe, Stage
from training.models.classifier import Classifier
from training.utils.device import cuda_capture_lock

REMEDY: Final = "use compile = false"

_STREAMS: Final = "set_warn_on_accumulate_grad_stream_mismatch"
"""Of torch.autograd.graph, where it has one: switches a warning off."""

Run = Callable[[Tensor], Tensor]


class WholeBatches(nn.Module):
    """A network that runs a faster way on batches as large as the first one it sees.

    The odd batch that ends an epoch runs as it always did: to make ready for it would cost more
    time than one batch an epoch can win back. Its parameters are the network's own.
    """

    def __init__(
        self, network: nn.Sequential, make: Callable[[nn.Sequential, Tensor], Run]
    ) -> None:
        """`make` is called with the network and the first batch, when that comes."""
        super().__init__()
        self.network, self._make, self._size = network, make, 0
        self._fast: Run = network.forward

    def forward(self, inputs: Tensor) -> Tensor:
        """As the network.

        Raises:
            OptionError: It can't be made faster; names the option.
        """
        if not self._size:
            self._size, self._fast = len(inputs), self._make(self.network, inputs)
        if len(inputs) != self._size:
            outputs: Tensor = self.network(inputs)
            return outputs
        try:
            return self._fast(inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise _refused("compile", error) from error


def compiled(network: nn.Sequential, _: Tensor) -> Run:
    """Compile for batches as large as the first one, when that is run."""

    def run(inputs: Tensor) -> Tensor:
        outputs: Tensor = network(inputs)
        return outputs

    return torch.compile(run, dynamic=False)


def captured(network: nn.Sequential, inputs: Tensor) -> Run:
    """Record a forward and a backward pass for batches as large as `inputs`, and replay them.

    All but the last layer, a classifier's head, which runs as ever. BatchNorm statistics and the
    random state are left as they are. A gradient that was not taken before the next backward pass
    is overwritten by it.

    Raises:
        OptionError: A layer does what can't be recorded, or the memory is too small. Random numbers
            may not be drawn on that device any more.
    """
    body, head = network[:-1], network[-1]
    if not len(body):
        return network.forward
    buffers = {name: buffer.clone() for name, buffer in body.named_buffers()}
    random = torch.cuda.get_rng_state(inputs.device)
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    if hasattr(torch.autograd.graph, _STREAMS):
        # Gradients come from the stream of the recording, and are waited for: as it should be.
        getattr(torch.autograd.graph, _STREAMS)(False)
    # Weights cast once and kept would be those of the recording for ever.
    autocast = torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False)
    try:
        with cuda_capture_lock, autocast:
            torch.cuda.make_graphed_callables(
                body, (inputs.detach().clone(),), allow_unused_input=True
            )
    except RuntimeError as error:
        raise _refused("record this network's kernels", error) from error
    with torch.no_grad():  # it has run a few times to warm up
        for name, buffer in body.named_buffers():
            buffer.copy_(buffers[name])
    torch.cuda.set_rng_state(random, inputs.device)

    def run(inputs: Tensor) -> Tensor:
        logits: Tensor = head(body(inputs))
        return logits

    return run


_made: WeakKeyDictionary[Classifier, tuple[str, WholeBatches]] = WeakKeyDictionary()
"""What was made of each classifier, and for which stage."""


def suffix_of(classifier: Classifier, stage: Stage, recipe: Recipe) -> nn.Module:
    """The classifier's suffix, made fast if the recipe says so: the same one for a whole stage."""
    if not recipe.compile:
        return classifier.suffix
    if classifier in _made and _made[classifier][0] == stage.name:
        return _made[classifier][1]
    # What was made for the stage before takes memory, a recording in circles of references.
    _made.pop(classifier, None)
    torch.compiler.reset()
    gc.collect()
    make = captured if recipe.compile == "cuda_graphs" else compiled
    fast = WholeBatches(classifier.suffix, make)
    _made[classifier] = stage.name, fast
    return fast


def check(recipe: Recipe, where: torch.device, processes: int = 1) -> None:
    """Find before any work what would stop it: something small is compiled for a try.

    Raises:
        OptionError: It can't be done here; names the option.
    """
    if recipe.compile == "cuda_graphs" and where.type != "cuda":
        raise OptionError("compile = 'cuda_graphs' needs a GPU; use compile = true or false")
    if recipe.compile == "cuda_graphs" and recipe.optimizer.accumulate > 1:
        raise OptionError(
            "compile = 'cuda_graphs' overwrites gradients that optimizer.accumulate = "
            f"{recipe.optimizer.accumulate} would add up; use compile = true, or accumulate = 1"
        )
    if recipe.compile == "cuda_graphs" and processes > 1:
        raise OptionError(
            "compile = 'cuda_graphs' is for one process: gradients that are replayed don't wait "
            "for the others; use compile = true or false"
        )
    if recipe.compile is not True:
        return
    if where.type == "cpu" and not _has_compiler():
        raise OptionError(f"compile: there is no C++ compiler here; install g++, or {REMEDY}")
    inputs = torch.ones(8, 8, device=where, requires_grad=True)
    try:
        torch.compile(lambda x: (x.sigmoid() * x).sum(), dynamic=False)(inputs).backward()
    except Exception as error:  # of whatever tool it is that does not work here
        raise _refused("compile", error) from error


def _has_compiler() -> bool:
    """Whether the C++ compiler is there that torch would call."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which((os.environ.get("CXX") or usual).split()[0]) is not None


def _refused(what: str, error: BaseException) -> OptionError:
    """With the first line of an error, or its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = lines[0].rstrip(".:") if lines else type(error).__name__
    return OptionError(f"compile: torch can't {what} here: {why}; {REMEDY}")
