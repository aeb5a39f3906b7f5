# LocalGPT; its errors go back through random fixed matrices (feedback alignment). Plain twin: localgpt.
# Training takes 5.6 GB at 64 sequences per micro-batch; --cost shows its parts, and the time here.
# python train.py config/presets/localgpt_fa.py
base("config/train_shakespeare_char.py", sample_interval=500, init_from="auto")
out_dir = "out-localgpt-fa"
n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
dropout = 0.2
bias = False
tie_weights = False
attn_mode = "sigmoid"
method = "fa"
