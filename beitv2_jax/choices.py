"""Named choices that a config can make, each declared once and read by the check of configs and by its implementation.

This module imports nothing, so that a wrong value is refused before jax is loaded.
"""

ATTENTION = ("reference", "cudnn", "pallas")
NEAREST_CODE = ("reference", "scan", "pallas")
CROSS_ENTROPY = ("reference", "rounded", "tiled")
REMAT = ("none", "dots", "full")
POSITIONS = ("absolute", "relative_shared", "relative", "none")
STEMS = ("linear", "conv")
QKV_BIASES = ("qv", "full", "none")
PARAM_INITS = ("normal", "clipped", "scaled")
QUANTIZERS = ("ema", "fsq", "simvq")
QUANTIZER_GRADIENTS = ("straight_through", "rotation")
POOLING = ("mean", "cls")
CLASS_WEIGHTS = ("none", "balanced")
NORMALIZATIONS = ("half", "imagenet", "clip", "unit")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")
FEATURE_DTYPES = ("int8", "bfloat16", "float16", "float32")
TEACHER_OUTPUTS = ("projected", "tokens")
TEACHER_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh")
GRID_MATCHES = ("resize_input", "resample_features")
POSITION_RESIZES = ("bicubic", "offset", "antialias", "bilinear")
SCHEDULES = ("cosine", "linear")
ON_FAILED_SAVE = ("continue", "stop")
DTYPES = ("float32", "bfloat16", "float16")
GRADIENT_DTYPES = ("float32", "bfloat16")
PROBE_PROTOCOLS = ("ours", "dinov3", "capi", "ep", "beit")
