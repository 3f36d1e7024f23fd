"""Read the weights of published teachers and of runs, and build frozen networks from them."""
