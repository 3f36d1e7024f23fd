"""Read and write PyTorch files without PyTorch, and without running code from them."""
