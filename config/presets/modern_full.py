# The plain modern block with what nanochat and others add to it, trained by Muon (rung M3).
# python train.py config/train_shakespeare_char_cpu.py config/presets/modern_full.py
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-modern-full"
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
short_conv = 4
token_shift = True
value_embeds = True
x0_skip = True
optimizer = "muon"
muon_lr, emb_lr, head_lr, scalar_lr = 0.009, 0.03, 0.003, 0.003
beta1, beta2 = 0.8, 0.95
lr_schedule = "wsd"
wsd_decay_share = 0.6
min_lr = 0.0
