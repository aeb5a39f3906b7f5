# Knot-gated attention over a wavelet landscape, carried on by waves. Cells of 8 tokens: a block of 64 has eight to tie.
out_dir = "out-kaufmann"
use_kaufmann_attention = True
knot_block = 8
