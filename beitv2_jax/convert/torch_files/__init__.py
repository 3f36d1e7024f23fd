"""Reading and writing PyTorch files without PyTorch and without running code from them."""
