# SwiGLU instead of the MLP, with as many parameters.
out_dir = "out-ablation/swiglu"
use_swiglu = True
