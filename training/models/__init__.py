"""Networks: backbones, layer groups, heads, freezing, pretrained weights, BatchNorm fusion."""
