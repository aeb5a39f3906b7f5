# LocalGPT as its configuration says: sigmoid attention, no biases, untied. Plain twin: localgpt_baseline.
# Training takes 4.0 GB at 64 sequences per micro-batch; --cost shows its parts, and the time here.
# python train.py config/presets/localgpt.py
base("config/train_shakespeare_char.py", sample_interval=500, init_from="auto")
out_dir = "out-localgpt"
n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
dropout = 0.2
bias = False
tie_weights = False
attn_mode = "sigmoid"
