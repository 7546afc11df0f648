"""Compare the predictions in a table of scores with true labels."""
