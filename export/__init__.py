"""Export: convert a checkpoint to ONNX, TorchScript and torch.export, and verify the bundle."""
