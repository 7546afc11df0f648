"""Networks that say something although nobody trained them."""

import torch
from torch import nn


def lively(network, x=None, seed=0):
    """Give a network BatchNorms that do something: a fresh one's are the identity.

    Gains have both signs, variances are drawn from 0.5 to 2. Drawn so, a deep network soon says
    nearly the same to every input. With `x`, means and variances are therefore what each layer sees
    for `x`, moved by up to half a standard deviation and by a factor of 0.5 to 2.
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
            norm.momentum = 1.0  # the statistics of one very batch
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
            # A channel that hardly varies would be blown up, and its rounding with it.
            norm.running_var.clamp_(min=norm.running_mean.square() / 4)
    return network.eval()


def speaking(classifier, x, *, centred=False):
    """Rescale the last layer so that logits have a standard deviation of 2 over `x`.

    `centred`: each class for itself and around zero, so that answers differ from photo to photo.
    """
    with torch.no_grad():
        last, logits = classifier.head[-1], classifier(x)
        factor = 2 / (logits.std(dim=0) if centred else logits.std().expand(logits.shape[1]))
        last.weight.mul_(factor[:, None])
        last.bias.copy_((last.bias - logits.mean(dim=0) * centred) * factor)
        assert classifier(x).std() >= 1
    return classifier
