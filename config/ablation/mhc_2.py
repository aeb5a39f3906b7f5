# Two residual streams, mixed by doubly stochastic matrices.
out_dir = "out-ablation/mhc_2"
use_mhc = True
mhc_streams = 2
