"""Model execution: runtimes for ONNX and TorchScript graphs, predictor, dynamic batching."""
