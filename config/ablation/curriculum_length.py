# The control of curriculum_e7: sequence length alone grows.
out_dir = "out-ablation/curriculum_length"
use_manifold = True
manifold = "e7"
skip_manifold_spectral = True
curriculum = "length"
curriculum_iters = 1000
