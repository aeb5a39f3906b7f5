# The NeuroManifold system at its smallest: words as sparse codes, Ramanujan positions, manifold and spectral
# coordinates, FitzHugh-Nagumo waves for attention, WaveKAN for the MLP, hyper-connections. Plain twin: nano_baseline.
# Training takes 0.11 GB at 4 sequences per micro-batch; --cost shows its parts, and the time here.
# python train.py config/presets/nano.py
base(
    "config/train_shakespeare_char.py", sample_interval=100, init_from="auto", batch_size=4, max_iters=300,
    eval_interval=100, eval_iters=10, dropout=0.0, always_save_checkpoint=True,
)  # fmt: skip
out_dir = "out-neuromanifold-nano"
n_layer, n_head, n_embd, block_size = 4, 4, 128, 256
use_sdr = True
sdr_size = 2048
pos_embedding = "ramanujan"
use_manifold = True
manifold_dim = 64
n_eigenvectors, spectral_landmarks = 64, 128
attn_mode = "fhn"
use_fhn_partitioning = True
use_kan = True
use_mhc = True
