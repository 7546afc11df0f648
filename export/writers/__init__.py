"""Writers of the exported graph: ONNX, TorchScript and torch.export."""
