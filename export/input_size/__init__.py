"""Compare the size of the trained network's input with other sizes, by accuracy and speed."""
