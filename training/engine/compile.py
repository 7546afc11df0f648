"""The recipe's `compile` option: `torch.compile` or CUDA graphs for the layers that train.

`torch.compile` (Ansel et al., 2024, "PyTorch 2") generates new kernels. A CUDA graph (Nguyen et
al., 2021, "Accelerating PyTorch with CUDA Graphs") launches a recorded sequence of the existing
kernels at once, which helps if the GPU waits for the CPU. Both wrap the layers in a function, so
that the classifier, its weights and their names do not change.
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
"""Function of torch.autograd.graph, in newer versions of torch, that turns a warning off."""

Forward = Callable[[Tensor], Tensor]


class FullBatchAccelerator(nn.Module):
    """A network with an accelerated forward pass for batches of the size of the first one.

    The smaller batch at the end of an epoch is not accelerated, because preparing for another size
    would take longer than one batch per epoch can save. Parameters are the network's own.
    """

    def __init__(
        self, network: nn.Sequential, accelerate: Callable[[nn.Sequential, Tensor], Forward]
    ) -> None:
        """`accelerate(network, first batch)` is called at the first forward pass."""
        super().__init__()
        self.network, self._accelerate, self._size = network, accelerate, 0
        self._accelerated: Forward = network.forward

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's forward pass.

        Raises:
            OptionError: The network can't be accelerated; the message names the option.
        """
        if not self._size:
            self._size, self._accelerated = len(inputs), self._accelerate(self.network, inputs)
        if len(inputs) != self._size:
            outputs: Tensor = self.network(inputs)
            return outputs
        try:
            return self._accelerated(inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise _not_possible("compile", error) from error


def compiled(network: nn.Sequential, _: Tensor) -> Forward:
    """The network with `torch.compile`, which compiles it at the first call."""

    def run(inputs: Tensor) -> Tensor:
        outputs: Tensor = network(inputs)
        return outputs

    return torch.compile(run, dynamic=False)


def captured(network: nn.Sequential, inputs: Tensor) -> Forward:
    """Capture forward and backward pass as CUDA graphs for batches of the size of `inputs`.

    The last layer, a classifier's head, is not captured. BatchNorm statistics and the random state
    are restored after the capture. A backward pass overwrites gradients that were not used before.

    Raises:
        OptionError: A layer can't be captured, or the memory is too small. After this error the
            device's random number generator can't be used any more.
    """
    body, head = network[:-1], network[-1]
    if not len(body):
        return network.forward
    buffers = {name: buffer.clone() for name, buffer in body.named_buffers()}
    random = torch.cuda.get_rng_state(inputs.device)
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    if hasattr(torch.autograd.graph, _STREAMS):
        # Gradients are computed on the capture's stream; torch synchronises it correctly.
        getattr(torch.autograd.graph, _STREAMS)(False)
    # With autocast's cache, replays would use the cast weights of the capture.
    autocast = torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False)
    try:
        with cuda_capture_lock, autocast:
            torch.cuda.make_graphed_callables(
                body, (inputs.detach().clone(),), allow_unused_input=True
            )
    except RuntimeError as error:
        raise _not_possible("record this network's kernels", error) from error
    with torch.no_grad():  # undo the warm-up passes
        for name, buffer in body.named_buffers():
            buffer.copy_(buffers[name])
    torch.cuda.set_rng_state(random, inputs.device)

    def run(inputs: Tensor) -> Tensor:
        logits: Tensor = head(body(inputs))
        return logits

    return run


_accelerators: WeakKeyDictionary[Classifier, tuple[str, FullBatchAccelerator]] = WeakKeyDictionary()
"""classifier -> (name of the stage, accelerated suffix). The suffix is the layers that train."""


def accelerated_suffix(classifier: Classifier, stage: Stage, recipe: Recipe) -> nn.Module:
    """The classifier's suffix, accelerated by the recipe's `compile`; created once per stage."""
    if not recipe.compile:
        return classifier.suffix
    if classifier in _accelerators and _accelerators[classifier][0] == stage.name:
        return _accelerators[classifier][1]
    # Free the memory of the previous stage's accelerator. A CUDA graph is in a reference cycle.
    _accelerators.pop(classifier, None)
    torch.compiler.reset()
    gc.collect()
    accelerate = captured if recipe.compile == "cuda_graphs" else compiled
    suffix = FullBatchAccelerator(classifier.suffix, accelerate)
    _accelerators[classifier] = stage.name, suffix
    return suffix


def check(recipe: Recipe, device: torch.device, processes: int = 1) -> None:
    """Check before the work begins that `compile` works here, by compiling a small function.

    Raises:
        OptionError: `compile` does not work here; the message names the option.
    """
    if recipe.compile == "cuda_graphs" and device.type != "cuda":
        raise OptionError("compile = 'cuda_graphs' needs a GPU; use compile = true or false")
    if recipe.compile == "cuda_graphs" and recipe.optimizer.accumulate > 1:
        raise OptionError(
            "compile = 'cuda_graphs' overwrites gradients that optimizer.accumulate = "
            f"{recipe.optimizer.accumulate} would add up; use compile = true, or accumulate = 1"
        )
    if recipe.compile == "cuda_graphs" and processes > 1:
        raise OptionError(
            "compile = 'cuda_graphs' works in a single process: replayed gradients are not "
            "synchronised with other processes; use compile = true or false"
        )
    if recipe.compile is not True:
        return
    if device.type == "cpu" and not _has_compiler():
        raise OptionError(f"compile: there is no C++ compiler here; install g++, or {REMEDY}")
    inputs = torch.ones(8, 8, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: (x.sigmoid() * x).sum(), dynamic=False)(inputs).backward()
    except Exception as error:  # from any tool that torch.compile calls
        raise _not_possible("compile", error) from error


def _has_compiler() -> bool:
    """Whether the C++ compiler that torch would call is installed."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which((os.environ.get("CXX") or default).split()[0]) is not None


def _not_possible(what: str, error: BaseException) -> OptionError:
    """An error with the first line of another error, or its type if it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = lines[0].rstrip(".:") if lines else type(error).__name__
    return OptionError(f"compile: torch can't {what} here: {why}; {REMEDY}")
