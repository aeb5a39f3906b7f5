# LocalGPT; its errors go straight to each sublayer through random fixed matrices (DFA). Plain twin: localgpt.
# Training takes 4.6 GB at 64 sequences per micro-batch; --cost shows its parts, and the time here.
# python train.py config/presets/localgpt_dfa.py
base("config/train_shakespeare_char.py", sample_interval=500, init_from="auto")
out_dir = "out-localgpt-dfa"
n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
dropout = 0.2
bias = False
tie_weights = False
attn_mode = "sigmoid"
method = "dfa"
