"""The recipe's `compile` option: `torch.compile` or CUDA graphs for the layers that train.

`torch.compile` (Ansel et al., 2024, "PyTorch 2") generates new kernels. A CUDA graph (Nguyen et
al., 2021, "Accelerating PyTorch with CUDA Graphs") keeps the existing kernels: it records their
sequence, and the CPU then starts the whole sequence with a single launch. CUDA graphs save time if
the GPU waits for the CPU. Both options only wrap the layers in a function: the classifier, the
weights and the names of the weights stay the same.
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
"""Name of a function of torch.autograd.graph that turns a warning off. Older versions of torch do
not have this function."""

Forward = Callable[[Tensor], Tensor]


class FullBatchAccelerator(nn.Module):
    """Wrapper that accelerates a network's forward pass for batches as large as the first batch.

    The smaller last batch of an epoch is not accelerated: the preparation for another batch size
    takes longer than one accelerated batch per epoch saves. The wrapper shares the network's
    parameters.
    """

    def __init__(
        self, network: nn.Sequential, accelerate: Callable[[nn.Sequential, Tensor], Forward]
    ) -> None:
        """Wrap a network.

        Args:
            network: The network.
            accelerate: `compiled` or `captured`. The first forward pass calls this function with
                the network and the first batch, and uses the forward function that it returns.
        """
        super().__init__()
        self.network, self._accelerate, self._size = network, accelerate, 0
        self._accelerated: Forward = network.forward

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the network's outputs.

        Raises:
            OptionError: The network can't be accelerated; the message names the option `compile`.
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
    """Return the network's forward function, wrapped by `torch.compile`.

    The compilation takes place at the first call of the returned function.
    """

    def run(inputs: Tensor) -> Tensor:
        outputs: Tensor = network(inputs)
        return outputs

    return torch.compile(run, dynamic=False)


def captured(network: nn.Sequential, inputs: Tensor) -> Forward:
    """Capture the network's forward and backward passes as CUDA graphs.

    The last child of the network, a classifier's head, is not captured. BatchNorm statistics and
    the random state are restored after the capture. A backward pass of the captured layers
    overwrites existing gradients instead of adding to them.

    Args:
        network: The layers that train, on a GPU.
        inputs: A batch. The graphs only accept batches of the same shape.

    Returns:
        A function from a batch to logits, used instead of the network's forward pass.

    Raises:
        OptionError: A layer can't be captured, or the GPU memory is too small. After this error the
            GPU's random number generator can't be used any more.
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
"""For each classifier, the name of the current stage and its accelerated trainable layers."""


def accelerated_suffix(classifier: Classifier, stage: Stage, recipe: Recipe) -> nn.Module:
    """Return the classifier's trainable layers, accelerated as the recipe's `compile` says.

    The accelerated layers are created at the first call for a stage; later calls return the same
    module.
    """
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
    """Check before training that the recipe's `compile` option works on this machine.

    With `compile = true` a small function is compiled as a test.

    Args:
        recipe: The recipe.
        device: The device to train on.
        processes: Number of processes that train.

    Raises:
        OptionError: `compile` does not work with this device, number of processes or
            `optimizer.accumulate`, or the test compilation fails.
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
    """Return whether the C++ compiler that `torch.compile` calls on a CPU is installed."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which((os.environ.get("CXX") or default).split()[0]) is not None


def _not_possible(what: str, error: BaseException) -> OptionError:
    """Return an OptionError whose message contains the first line of `error`.

    If `error` has no text, the message contains the name of the exception class instead.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = lines[0].rstrip(".:") if lines else type(error).__name__
    return OptionError(f"compile: torch can't {what} here: {why}; {REMEDY}")
