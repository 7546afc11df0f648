"""Cache of the outputs of frozen layers, and the data loaders of training, which use this cache."""
