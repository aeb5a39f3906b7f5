# The whole diagram of the NeuroManifold system: Kaufmann layers (knots, landscape, waves) in place of waves alone, the
# E7 coset as manifold with its curriculum, layer aggregation. Plain twin: shakespeare_char_baseline.
# Training takes 7.6 GB at 64 sequences per micro-batch; --cost shows its parts, and the time here.
# python train.py config/presets/neuromanifold_kaufmann.py
base("config/train_shakespeare_char.py", sample_interval=500, init_from="auto", curriculum="e7", curriculum_iters=3500)
out_dir = "out-neuromanifold-kaufmann"
n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
use_sdr = True
sdr_size = 1024
pos_embedding = "ramanujan"
use_manifold = True
manifold = "e7"
n_eigenvectors, spectral_landmarks = 64, 128
use_kaufmann_attention = True
use_fhn_partitioning = True
use_kan = True
use_mhc = True
use_mla = True
