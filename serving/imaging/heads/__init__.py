"""Read what the head of an image file states, without decoding the image."""
