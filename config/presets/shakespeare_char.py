# The NeuroManifold system for the characters of Shakespeare; what its parts are: nano.py. Plain twin:
# shakespeare_char_baseline.
# Training takes 6.7 GB at 64 sequences per micro-batch; --cost shows its parts, and the time here.
# python train.py config/presets/shakespeare_char.py
base("config/train_shakespeare_char.py", sample_interval=500, init_from="auto")
out_dir = "out-neuromanifold-shakespeare-char"
n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
use_sdr = True
sdr_size = 1024
pos_embedding = "ramanujan"
use_manifold = True
manifold_dim = 64
n_eigenvectors, spectral_landmarks = 64, 128
attn_mode = "fhn"
use_fhn_partitioning = True
use_kan = True
use_mhc = True
