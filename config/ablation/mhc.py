# Four residual streams, mixed by doubly stochastic matrices.
out_dir = "out-ablation/mhc"
use_mhc = True
