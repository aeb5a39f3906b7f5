# The plain modern block, trained by Muon: no idea in it (rung M2).
# python train.py config/train_shakespeare_char_cpu.py config/presets/modern_muon.py
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-modern-muon"
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
