"""Turn encoded images into model input: decoding, limits, preprocessing, TTA views."""
