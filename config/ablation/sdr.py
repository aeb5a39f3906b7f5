# Tokens as 40 of 2048 bits, a map, a context of four time constants, a Hebbian memory of what came next.
out_dir = "out-ablation/sdr"
use_sdr = True
