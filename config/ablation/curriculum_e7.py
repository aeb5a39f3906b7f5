# Sequence length and coset dimensions grow in seven stages along E7's chain of subgroups.
out_dir = "out-ablation/curriculum_e7"
use_manifold = True
manifold = "e7"
skip_manifold_spectral = True
curriculum = "e7"
curriculum_iters = 1000
