# The NeuroManifold system in GPT-2 small's shape, words as plain embeddings (--use_sdr: as sparse codes of 2048 bits);
# what its parts are: nano.py. Plain twin: small_baseline. python data/openwebtext/prepare.py
# Training takes 21 GB at 12 sequences per micro-batch; --cost shows its parts, and the time here.
# torchrun --standalone --nproc_per_node=8 train.py config/presets/small.py
base("config/train_gpt2.py", sample_interval=500, init_from="auto")
out_dir = "out-neuromanifold-small"
n_layer, n_head, n_embd, block_size = 12, 12, 768, 1024
pos_embedding = "ramanujan"
use_manifold = True
manifold_dim = 128
n_eigenvectors, spectral_landmarks = 64, 128
attn_mode = "fhn"
use_fhn_partitioning = True
use_kan = True
use_mhc = True
