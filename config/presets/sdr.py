# Words as 40 of 1024 bits on a map, with a decayed context and an associative memory of what came next.
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-sdr"
use_sdr = True
sdr_size = 1024
