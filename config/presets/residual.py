# Four residual streams, mixed by doubly stochastic matrices.
out_dir = "out-residual"
use_mhc = True
