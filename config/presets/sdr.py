# Words as 40 of 1024 bits on a map, with a decayed context and an associative memory of what came next.
out_dir = "out-sdr"
use_sdr = True
sdr_size = 1024
