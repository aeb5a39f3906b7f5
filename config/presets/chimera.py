# The best that a search on the modern block found (docs/results.md): beside a convolution over four tokens, gated
# linear attention and softmax attention in turn. 1.537 where the convolution alone has 1.542, which three seeds cannot
# tell apart: the control is modern_muon.py with --short_conv=4.
# python train.py config/presets/chimera.py
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-chimera"
short_conv = 4
attn_pattern = "gla,softmax"
norm = "rms"
qk_norm = True
pos_embedding = "rope"
mlp_act = "relu2"
emb_norm = True
zero_init_proj = True
init_gain = 0.6
logit_softcap = 15.0
tie_weights = False
bias = False
optimizer = "muon"
muon_lr, emb_lr, head_lr, scalar_lr = 0.009, 0.03, 0.003, 0.003
beta1, beta2 = 0.8, 0.95
lr_schedule = "wsd"
wsd_decay_share = 0.6
min_lr = 0.0
