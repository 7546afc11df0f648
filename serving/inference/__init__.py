"""Model execution: runtimes, predictor, request batching."""
