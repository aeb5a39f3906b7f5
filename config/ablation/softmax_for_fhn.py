# Over a preset with waves: attention instead. python train.py config/presets/nano.py config/ablation/softmax_for_fhn.py
out_dir = "out-ablation/softmax_for_fhn"
attn_mode = "softmax"
