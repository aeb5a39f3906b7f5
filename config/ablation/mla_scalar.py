# The head reads a learned mix of all layers.
out_dir = "out-ablation/mla_scalar"
use_mla = True
mla_mode = "scalar"
