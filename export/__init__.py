"""Export a checkpoint as ONNX, TorchScript and torch.export files, and verify the bundle."""
