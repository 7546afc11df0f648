"""From encoded bytes to model input: decoding, limits, preprocessing, test-time augmentation."""
