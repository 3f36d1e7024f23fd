"""Weights of other layouts and of finished runs, as trees of this package, and back.

- containers: `files` reads any of them; `pickles` and `unpickle` those of torch, `torch_writer` writes one
- BEiT's layouts: `names` and `official` (released), `timm_beit`, `huggingface`; `arguments` reads sizes from shapes,
  `positions` resizes to another grid
- whole weights: `weights` (read, write), `adapt` (the start of another model), `runs` (run directories), `__main__`
- teachers: `teacher_layouts`, `teacher_weights`, `teachers`
"""
