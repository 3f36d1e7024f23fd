"""Convert weights between other layouts, runs of this package and its parameter trees.

- torch_files/  read and write PyTorch files without PyTorch
- beit/         layouts of BEiT weights: official release, timm, Hugging Face
- teachers/     layouts of published teachers, and loading them as frozen networks
- files, runs   read any weights file as a state dict; read and write run directories
- weights       read and write weights of any layout; adapt uses them to initialise another model
- arguments     infer model arguments from the shapes of weights
- positions     resize position embeddings and tables
"""
