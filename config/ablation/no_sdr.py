# Over a preset with sparse codes: plain embeddings instead.
# python train.py config/presets/nano.py config/ablation/no_sdr.py
out_dir = "out-ablation/no_sdr"
use_sdr = False
