"""Write the HTML report of a training run, with its charts."""
