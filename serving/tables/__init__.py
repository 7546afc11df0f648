"""Tables of paths, labels and parts: how they are written, their columns and rows."""
