"""Untrained networks with random BatchNorms, whose outputs depend on the input."""

import torch
from torch import nn


def randomise_batchnorms(network, x=None, seed=0):
    """Give a network random BatchNorms, because those of a new network are the identity.

    Gains have both signs, variances are drawn from 0.5 to 2. With such values a deep network gives
    nearly the same output for every input. With `x`, means and variances are therefore those of
    each layer's inputs for `x`, moved by up to half a standard deviation and by a factor of 0.5 to
    2.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like, low, high):
        return torch.rand(like.shape, generator=generator, dtype=like.dtype) * (high - low) + low

    network.eval()
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.running_mean.copy_(uniform(norm.running_mean, -1, 1))
            norm.running_var.copy_(uniform(norm.running_var, 0.5, 2))
            norm.momentum = 1.0  # the statistics become those of the next batch
            if norm.affine:
                sign = uniform(norm.weight, -1, 3).sign()  # a quarter is negative
                norm.weight.copy_(uniform(norm.weight, 0.5, 1.5) * sign)
                norm.bias.copy_(uniform(norm.bias, -1, 1))
        if x is None:
            return network
        for norm in norms:
            norm.train()
        network(x)
        for norm in norms:
            norm.running_mean += uniform(norm.running_mean, -0.5, 0.5) * norm.running_var.sqrt()
            norm.running_var *= uniform(norm.running_var, 0.5, 2)
            # A tiny variance would amplify a nearly constant channel, and with it its rounding.
            norm.running_var.clamp_(min=norm.running_mean.square() / 4)
    return network.eval()


def scale_logits(classifier, x, *, centred=False):
    """Rescale the last layer so that logits have a standard deviation of 2 over `x`.

    `centred`: rescale each class separately and to mean 0, so that predictions differ by photo.
    """
    with torch.no_grad():
        last, logits = classifier.head[-1], classifier(x)
        factor = 2 / (logits.std(dim=0) if centred else logits.std().expand(logits.shape[1]))
        last.weight.mul_(factor[:, None])
        last.bias.copy_((last.bias - logits.mean(dim=0) * centred) * factor)
        assert classifier(x).std() >= 1
    return classifier
