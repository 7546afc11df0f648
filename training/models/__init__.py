"""Networks: torchvision bodies, heads, frozen layers, pretrained weights, BatchNorm folding."""
