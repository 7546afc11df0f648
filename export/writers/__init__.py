"""Write the exported graph as ONNX, TorchScript and torch.export files."""
