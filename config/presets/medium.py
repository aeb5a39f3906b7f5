# The NeuroManifold system in GPT-2 medium's shape; the rest as small.py. Plain twin: medium_baseline.
# python data/openwebtext/prepare.py
# Training takes 29 GB at 6 sequences per micro-batch; --cost shows its parts, and the time here.
# torchrun --standalone --nproc_per_node=8 train.py config/presets/medium.py
base("config/train_gpt2.py", sample_interval=500, init_from="auto", batch_size=6, gradient_accumulation_steps=80)
out_dir = "out-neuromanifold-medium"
n_layer, n_head, n_embd, block_size = 24, 16, 1024, 1024
pos_embedding = "ramanujan"
use_manifold = True
manifold_dim = 128
n_eigenvectors, spectral_landmarks = 64, 128
attn_mode = "fhn"
use_fhn_partitioning = True
use_kan = True
use_mhc = True
