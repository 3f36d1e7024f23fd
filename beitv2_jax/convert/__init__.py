"""Weights of other layouts and of finished runs, as trees of this package, and back.

- torch_files/  the files of PyTorch, read and written without PyTorch
- beit/         layouts of BEiT weights: official release, timm, Hugging Face
- teachers/     layouts of published teachers and the frozen networks made of them
- files, runs   any weight file as a state dict; run directories of this package
- weights       whole weights of any layout (read, write); adapt fits them to another model
- arguments     sizes of a model read from the shapes of its weights; positions resizes to another grid
"""
