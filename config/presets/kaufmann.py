# Knot-gated attention over a wavelet landscape, carried on by waves. Cells of 8 tokens: a block of 64 has eight to tie.
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-kaufmann"
use_kaufmann_attention = True
knot_block = 8
