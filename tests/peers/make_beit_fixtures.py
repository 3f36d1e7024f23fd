"""Write tests/golden/beit_peers.safetensors: PYTHONPATH=tests/helpers python tests/peers/make_beit_fixtures.py"""

import json
from pathlib import Path

import numpy as np
from beit_oracles import HUGGINGFACE, TIMM, case
from safetensors.numpy import save_file

arrays, configs = {}, {}
for name in TIMM + HUGGINGFACE:
    made = case(name)
    outputs = {key: value.astype(np.float32) for key, value in made.outputs.items()}
    for section, values in (("state", made.state), ("inputs", made.inputs), ("outputs", outputs)):
        arrays |= {f"{name}/{section}/{key}": np.asarray(value, order="C") for key, value in values.items()}
    configs[name] = json.dumps(made.config)
path = Path(__file__).parents[1] / "golden" / "beit_peers.safetensors"
save_file(arrays, path, metadata=configs)
print(path, path.stat().st_size, "bytes")
